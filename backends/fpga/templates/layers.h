// The streaming layers that kernel.cpp strings together: one function template for each kind of
// layer of Trivium's integer dataflow IR, its geometry in a struct of constants (the parameter L).
//
// A stream carries an image row by row, pixel by pixel, channels innermost, several channels
// ("lanes") at a time. Nothing here is float: what a layer rounds, it rounds as ONNX's
// QuantizeLinear does, and the result is bit for bit that of the IR's interpreter.
//
// Copyright the Trivium authors; Apache-2.0.
#pragma once

#include <ap_int.h>
#include <hls_stream.h>

// What one clock cycle moves: N neighbouring channels of one pixel.
template <class T, int N>
struct Lanes {
    T lane[N];
};

template <class T, int N>
using Stream = hls::stream<Lanes<T, N>>;

// Round product / 2^SHIFT as float32 arithmetic would: to 24 significant bits, then to the nearest
// integer, ties to even. The first rounding matters only next to k + 1/2: what is at most half a
// float32 step away from it becomes a tie.
template <int SHIFT, class Product>
Product round_like_float32(Product product) {
#pragma HLS INLINE
    const Product floor = product >> SHIFT;
    const Product rest = product & ((Product(1) << SHIFT) - 1);
    const Product from_half = rest - (Product(1) << (SHIFT - 1));
    const Product magnitude = floor < 0 ? Product(-floor - 1) : Product(floor);
    const Product distance = from_half < 0 ? Product(-from_half) : Product(from_half);
    Product half_step = 0;
    if (SHIFT >= 25) half_step = Product(1) << (SHIFT >= 25 ? SHIFT - 25 : 0);
    // Beyond 2^10 every output type of a layer is long saturated.
    for (int bits = 1; bits <= 10; ++bits) {
#pragma HLS UNROLL
        const int exponent = SHIFT + bits - 25;
        if (exponent >= 0 && magnitude >= (Product(1) << (bits - 1)))
            half_step = Product(1) << exponent;
    }
    const bool odd = (floor & 1) != 0;
    const bool up = distance <= half_step ? odd : from_half > 0;
    return up ? Product(floor + 1) : floor;
}

// Round numerator / 2^SHIFT to the nearest integer, ties to even.
template <int SHIFT, class Number>
Number round_half_even(Number numerator) {
#pragma HLS INLINE
    const Number floor = numerator >> SHIFT;
    const Number rest = numerator & ((Number(1) << SHIFT) - 1);
    const Number from_half = rest - (Number(1) << (SHIFT - 1));
    const bool odd = (floor & 1) != 0;
    const bool up = from_half == 0 ? odd : from_half > 0;
    return up ? Number(floor + 1) : floor;
}

template <class Number>
Number saturate(Number value, int lo, int hi) {
#pragma HLS INLINE
    return value < lo ? Number(lo) : value > hi ? Number(hi) : value;
}

// acc * multiplier / 2^SHIFT, rounded, moved by the zero point, saturated.
template <class L>
typename L::Out requantize(typename L::Accumulator acc, typename L::Multiplier multiplier) {
#pragma HLS INLINE
    const typename L::Product product = typename L::Product(acc) * multiplier;
    const typename L::Product rounded = round_like_float32<L::SHIFT>(product);
    return saturate(typename L::Product(rounded + L::ZERO_POINT), L::LO, L::HI);
}

// --- the kernel's memory ------------------------------------------------------------------------

template <class Memory, class T, int LANES>
void load(const Memory* memory, Stream<T, LANES>& out, int count) {
    for (int i = 0; i < count; ++i) {
#pragma HLS PIPELINE II = 1
        Lanes<T, LANES> lanes;
        for (int n = 0; n < LANES; ++n) {
#pragma HLS UNROLL
            lanes.lane[n] = memory[i * LANES + n];
        }
        out.write(lanes);
    }
}

template <class Memory, class T, int LANES>
void store(Stream<T, LANES>& in, Memory* memory, int count) {
    for (int i = 0; i < count; ++i) {
#pragma HLS PIPELINE II = 1
        const Lanes<T, LANES> lanes = in.read();
        for (int n = 0; n < LANES; ++n) {
#pragma HLS UNROLL
            memory[i * LANES + n] = lanes.lane[n];
        }
    }
}

// --- plumbing -------------------------------------------------------------------------------------

// Give two layers the same stream.
template <class T, int LANES>
void fork(Stream<T, LANES>& in, Stream<T, LANES>& first, Stream<T, LANES>& second, int count) {
    for (int i = 0; i < count; ++i) {
#pragma HLS PIPELINE II = 1
        const Lanes<T, LANES> lanes = in.read();
        first.write(lanes);
        second.write(lanes);
    }
}

// Change how many channels move in a cycle.
template <class T, int CHANNELS, int FROM, int TO>
void relane(Stream<T, FROM>& in, Stream<T, TO>& out, int pixels) {
    for (int i = 0; i < pixels; ++i) {
        T pixel[CHANNELS];
#pragma HLS ARRAY_PARTITION variable = pixel complete
        for (int c = 0; c < CHANNELS; c += FROM) {
#pragma HLS PIPELINE II = 1
            const Lanes<T, FROM> lanes = in.read();
            for (int n = 0; n < FROM; ++n) {
#pragma HLS UNROLL
                pixel[c + n] = lanes.lane[n];
            }
        }
        for (int c = 0; c < CHANNELS; c += TO) {
#pragma HLS PIPELINE II = 1
            Lanes<T, TO> lanes;
            for (int n = 0; n < TO; ++n) {
#pragma HLS UNROLL
                lanes.lane[n] = pixel[c + n];
            }
            out.write(lanes);
        }
    }
}

// --- sliding windows ------------------------------------------------------------------------------

// A layer with a window keeps the last rows of its input in `rows[SLOTS][IN_WIDTH][IN_CHANNELS]`,
// row y in slot y % SLOTS; SLOTS is a power of two that is not less than the window's height.

// Read rows from the stream, from `next` up to and including `last`.
template <class L>
void fill(Stream<typename L::In, L::IN_LANES>& in,
          typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS], int& next, int last) {
#pragma HLS INLINE
    for (; next <= last; ++next) {
#pragma HLS LOOP_TRIPCOUNT min = 0 max = 2
        for (int x = 0; x < L::IN_WIDTH; ++x) {
            for (int c = 0; c < L::IN_CHANNELS; c += L::IN_LANES) {
#pragma HLS PIPELINE II = 1
                const Lanes<typename L::In, L::IN_LANES> lanes = in.read();
                for (int n = 0; n < L::IN_LANES; ++n) {
#pragma HLS UNROLL
                    rows[next & (L::SLOTS - 1)][x][c + n] = lanes.lane[n];
                }
            }
        }
    }
}

// The last input row that the window of an output row needs.
template <class L>
int last_row(int output_row) {
#pragma HLS INLINE
    const int last = output_row * L::STRIDE_Y - L::PAD_TOP + L::SPAN_Y - 1;
    return last < L::IN_HEIGHT ? last : L::IN_HEIGHT - 1;
}

// The value under the window, or what stands outside of the image.
template <class L>
typename L::In at(const typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS], int output_row,
                  int output_column, int ky, int kx, int channel) {
#pragma HLS INLINE
    const int y = output_row * L::STRIDE_Y - L::PAD_TOP + ky * L::DILATION_Y;
    const int x = output_column * L::STRIDE_X - L::PAD_LEFT + kx * L::DILATION_X;
    const bool inside = y >= 0 && y < L::IN_HEIGHT && x >= 0 && x < L::IN_WIDTH;
    return inside ? rows[y & (L::SLOTS - 1)][x][channel] : typename L::In(L::PADDING);
}

// Convolution, and the dense layer, whose window is the whole image. Folded: in each cycle PE output
// channels take SIMD input channels each; FOLDS passes over the window make all output channels.
template <class L>
void convolution(Stream<typename L::In, L::IN_LANES>& in, Stream<typename L::Out, L::PE>& out,
                 const typename L::Weight weight[L::FOLDS][L::KERNEL_Y][L::KERNEL_X][L::STEPS]
                                                [L::PE][L::SIMD],
                 const typename L::Bias bias[L::FOLDS][L::PE],
                 const typename L::Multiplier multiplier[L::FOLDS][L::PE], int frames) {
    const int banks = L::BANKS;
    typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS];
#pragma HLS ARRAY_PARTITION variable = rows dim = 3 cyclic factor = banks
#pragma HLS ARRAY_PARTITION variable = weight dim = 5 complete
#pragma HLS ARRAY_PARTITION variable = weight dim = 6 complete
#pragma HLS ARRAY_PARTITION variable = bias dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = multiplier dim = 2 complete
    typename L::Accumulator acc[L::PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    for (int frame = 0; frame < frames; ++frame) {
        int next = 0;
        for (int oy = 0; oy < L::OUT_HEIGHT; ++oy) {
            fill<L>(in, rows, next, last_row<L>(oy));
            for (int ox = 0; ox < L::OUT_WIDTH; ++ox)
                for (int fold = 0; fold < L::FOLDS; ++fold)
                    for (int ky = 0; ky < L::KERNEL_Y; ++ky)
                        for (int kx = 0; kx < L::KERNEL_X; ++kx)
                            for (int step = 0; step < L::STEPS; ++step) {
#pragma HLS PIPELINE II = 1
                                const bool first = ky == 0 && kx == 0 && step == 0;
                                const bool last = ky == L::KERNEL_Y - 1 &&
                                                  kx == L::KERNEL_X - 1 && step == L::STEPS - 1;
                                typename L::In x[L::SIMD];
                                for (int s = 0; s < L::SIMD; ++s) {
#pragma HLS UNROLL
                                    x[s] = at<L>(rows, oy, ox, ky, kx, step * L::SIMD + s);
                                }
                                Lanes<typename L::Out, L::PE> result;
                                for (int pe = 0; pe < L::PE; ++pe) {
#pragma HLS UNROLL
                                    typename L::Accumulator sum =
                                        first ? typename L::Accumulator(bias[fold][pe]) : acc[pe];
                                    for (int s = 0; s < L::SIMD; ++s) {
#pragma HLS UNROLL
                                        sum += weight[fold][ky][kx][step][pe][s] * x[s];
                                    }
                                    acc[pe] = sum;
                                    result.lane[pe] = L::finish(sum, multiplier[fold][pe]);
                                }
                                if (last) out.write(result);
                            }
        }
        fill<L>(in, rows, next, L::IN_HEIGHT - 1);
    }
}

// Convolution of each channel by itself, PE channels at a time.
template <class L>
void depthwise(Stream<typename L::In, L::IN_LANES>& in, Stream<typename L::Out, L::PE>& out,
               const typename L::Weight weight[L::FOLDS][L::KERNEL_Y][L::KERNEL_X][L::PE],
               const typename L::Bias bias[L::FOLDS][L::PE],
               const typename L::Multiplier multiplier[L::FOLDS][L::PE], int frames) {
    const int banks = L::BANKS;
    typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS];
#pragma HLS ARRAY_PARTITION variable = rows dim = 3 cyclic factor = banks
#pragma HLS ARRAY_PARTITION variable = weight dim = 4 complete
#pragma HLS ARRAY_PARTITION variable = bias dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = multiplier dim = 2 complete
    typename L::Accumulator acc[L::PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    for (int frame = 0; frame < frames; ++frame) {
        int next = 0;
        for (int oy = 0; oy < L::OUT_HEIGHT; ++oy) {
            fill<L>(in, rows, next, last_row<L>(oy));
            for (int ox = 0; ox < L::OUT_WIDTH; ++ox)
                for (int fold = 0; fold < L::FOLDS; ++fold)
                    for (int ky = 0; ky < L::KERNEL_Y; ++ky)
                        for (int kx = 0; kx < L::KERNEL_X; ++kx) {
#pragma HLS PIPELINE II = 1
                            const bool first = ky == 0 && kx == 0;
                            const bool last = ky == L::KERNEL_Y - 1 && kx == L::KERNEL_X - 1;
                            Lanes<typename L::Out, L::PE> result;
                            for (int pe = 0; pe < L::PE; ++pe) {
#pragma HLS UNROLL
                                typename L::Accumulator sum =
                                    first ? typename L::Accumulator(bias[fold][pe]) : acc[pe];
                                sum += weight[fold][ky][kx][pe] *
                                       at<L>(rows, oy, ox, ky, kx, fold * L::PE + pe);
                                acc[pe] = sum;
                                result.lane[pe] = L::finish(sum, multiplier[fold][pe]);
                            }
                            if (last) out.write(result);
                        }
        }
        fill<L>(in, rows, next, L::IN_HEIGHT - 1);
    }
}

// The largest value under each window, PE channels at a time.
template <class L>
void max_pool(Stream<typename L::In, L::IN_LANES>& in, Stream<typename L::Out, L::PE>& out,
              int frames) {
    const int banks = L::BANKS;
    typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS];
#pragma HLS ARRAY_PARTITION variable = rows dim = 3 cyclic factor = banks
    Lanes<typename L::Out, L::PE> largest;
    for (int frame = 0; frame < frames; ++frame) {
        int next = 0;
        for (int oy = 0; oy < L::OUT_HEIGHT; ++oy) {
            fill<L>(in, rows, next, last_row<L>(oy));
            for (int ox = 0; ox < L::OUT_WIDTH; ++ox)
                for (int fold = 0; fold < L::FOLDS; ++fold)
                    for (int ky = 0; ky < L::KERNEL_Y; ++ky)
                        for (int kx = 0; kx < L::KERNEL_X; ++kx) {
#pragma HLS PIPELINE II = 1
                            const bool first = ky == 0 && kx == 0;
                            const bool last = ky == L::KERNEL_Y - 1 && kx == L::KERNEL_X - 1;
                            for (int pe = 0; pe < L::PE; ++pe) {
#pragma HLS UNROLL
                                const typename L::In x =
                                    at<L>(rows, oy, ox, ky, kx, fold * L::PE + pe);
                                if (first || x > largest.lane[pe]) largest.lane[pe] = x;
                            }
                            if (last) out.write(largest);
                        }
        }
        fill<L>(in, rows, next, L::IN_HEIGHT - 1);
    }
}

// The mean of each window, PE channels at a time; the division is in the multiplier.
template <class L>
void average_pool(Stream<typename L::In, L::IN_LANES>& in, Stream<typename L::Out, L::PE>& out,
                  int frames) {
    const int banks = L::BANKS;
    typename L::In rows[L::SLOTS][L::IN_WIDTH][L::IN_CHANNELS];
#pragma HLS ARRAY_PARTITION variable = rows dim = 3 cyclic factor = banks
    typename L::Accumulator acc[L::PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    for (int frame = 0; frame < frames; ++frame) {
        int next = 0;
        for (int oy = 0; oy < L::OUT_HEIGHT; ++oy) {
            fill<L>(in, rows, next, last_row<L>(oy));
            for (int ox = 0; ox < L::OUT_WIDTH; ++ox)
                for (int fold = 0; fold < L::FOLDS; ++fold)
                    for (int ky = 0; ky < L::KERNEL_Y; ++ky)
                        for (int kx = 0; kx < L::KERNEL_X; ++kx) {
#pragma HLS PIPELINE II = 1
                            const bool first = ky == 0 && kx == 0;
                            const bool last = ky == L::KERNEL_Y - 1 && kx == L::KERNEL_X - 1;
                            Lanes<typename L::Out, L::PE> result;
                            for (int pe = 0; pe < L::PE; ++pe) {
#pragma HLS UNROLL
                                typename L::Accumulator sum =
                                    first ? typename L::Accumulator(L::OFFSET) : acc[pe];
                                sum += at<L>(rows, oy, ox, ky, kx, fold * L::PE + pe);
                                acc[pe] = sum;
                                result.lane[pe] = L::finish(sum, L::MULTIPLIER);
                            }
                            if (last) out.write(result);
                        }
        }
        fill<L>(in, rows, next, L::IN_HEIGHT - 1);
    }
}

// --- elementwise ----------------------------------------------------------------------------------

template <class L>
void add(Stream<typename L::InA, L::LANES>& a, Stream<typename L::InB, L::LANES>& b,
         Stream<typename L::Out, L::LANES>& out, int frames) {
    for (int i = 0; i < frames * L::COUNT; ++i) {
#pragma HLS PIPELINE II = 1
        const Lanes<typename L::InA, L::LANES> x = a.read();
        const Lanes<typename L::InB, L::LANES> y = b.read();
        Lanes<typename L::Out, L::LANES> result;
        for (int n = 0; n < L::LANES; ++n) {
#pragma HLS UNROLL
            const typename L::Accumulator sum =
                x.lane[n] * L::MULTIPLIER_A + y.lane[n] * L::MULTIPLIER_B + L::OFFSET;
            result.lane[n] = saturate(round_half_even<L::SHIFT>(sum), L::LO, L::HI);
        }
        out.write(result);
    }
}

template <class L>
void lookup(Stream<typename L::In, L::LANES>& in, Stream<typename L::Out, L::LANES>& out,
            const typename L::Out table[L::ENTRIES], int frames) {
    for (int i = 0; i < frames * L::COUNT; ++i) {
#pragma HLS PIPELINE II = 1
        const Lanes<typename L::In, L::LANES> x = in.read();
        Lanes<typename L::Out, L::LANES> result;
        for (int n = 0; n < L::LANES; ++n) {
#pragma HLS UNROLL
            result.lane[n] = table[x.lane[n] - L::FIRST];
        }
        out.write(result);
    }
}
