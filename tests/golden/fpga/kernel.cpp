// small, as streams of integers. Written by Trivium 0.1.0 for amd-zcu104; edits are lost.
//
//   convolution0: conv4, 11 x 6 x 8, PE 1, SIMD 1
//   convolution1: conv9, 11 x 6 x 8, PE 1, SIMD 8
//   depthwise0: conv15, 11 x 6 x 8, PE 1, SIMD 1
//   add0: add18, 11 x 6 x 8, PE 1, SIMD 1
//   max_pool0: maxpool22, 6 x 6 x 8, PE 1, SIMD 1
//   table0: quantizelinear25, 6 x 6 x 8, PE 1, SIMD 1
//   convolution2: conv29, 6 x 7 x 6, PE 1, SIMD 1
//   average_pool0: globalaveragepool32, 1 x 1 x 6, PE 1, SIMD 1
//   convolution3: matmul37, 1 x 1 x 5, PE 1, SIMD 1
#include "kernel.h"

#include "layers.h"
#include "weights.h"

struct convolution0_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    using Weight = int8_t;
    using Bias = ap_int<18>;
    using Accumulator = ap_int<19>;
    using Multiplier = ap_uint<26>;
    using Product = ap_int<47>;
    static constexpr int IN_HEIGHT = 11;
    static constexpr int IN_WIDTH = 11;
    static constexpr int IN_CHANNELS = 3;
    static constexpr int IN_LANES = 3;
    static constexpr int OUT_HEIGHT = 11;
    static constexpr int OUT_WIDTH = 6;
    static constexpr int KERNEL_Y = 3;
    static constexpr int KERNEL_X = 2;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 2;
    static constexpr int PAD_TOP = 1;
    static constexpr int PAD_LEFT = 0;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 3;
    static constexpr int SLOTS = 4;
    static constexpr int BANKS = 3;
    static constexpr int PADDING = 130;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 8;
    static constexpr int SIMD = 1;
    static constexpr int STEPS = 3;
    static constexpr int SHIFT = 35;
    static constexpr int ZERO_POINT = 145;
    static constexpr int LO = 0;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<convolution0_layer>(sum, multiplier);
    }
};

struct convolution1_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    using Weight = int8_t;
    using Bias = ap_int<19>;
    using Accumulator = ap_int<21>;
    using Multiplier = ap_uint<27>;
    using Product = ap_int<48>;
    static constexpr int IN_HEIGHT = 11;
    static constexpr int IN_WIDTH = 6;
    static constexpr int IN_CHANNELS = 8;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 11;
    static constexpr int OUT_WIDTH = 6;
    static constexpr int KERNEL_Y = 3;
    static constexpr int KERNEL_X = 3;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 1;
    static constexpr int PAD_LEFT = 1;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 3;
    static constexpr int SLOTS = 4;
    static constexpr int BANKS = 8;
    static constexpr int PADDING = 145;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 8;
    static constexpr int SIMD = 8;
    static constexpr int STEPS = 1;
    static constexpr int SHIFT = 35;
    static constexpr int ZERO_POINT = 132;
    static constexpr int LO = 132;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<convolution1_layer>(sum, multiplier);
    }
};

struct depthwise0_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    using Weight = int8_t;
    using Bias = ap_int<18>;
    using Accumulator = ap_int<18>;
    using Multiplier = ap_uint<26>;
    using Product = ap_int<45>;
    static constexpr int IN_HEIGHT = 11;
    static constexpr int IN_WIDTH = 6;
    static constexpr int IN_CHANNELS = 8;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 11;
    static constexpr int OUT_WIDTH = 6;
    static constexpr int KERNEL_Y = 3;
    static constexpr int KERNEL_X = 3;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 1;
    static constexpr int PAD_LEFT = 1;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 3;
    static constexpr int SLOTS = 4;
    static constexpr int BANKS = 1;
    static constexpr int PADDING = 145;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 8;
    static constexpr int SHIFT = 32;
    static constexpr int ZERO_POINT = 236;
    static constexpr int LO = 0;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<depthwise0_layer>(sum, multiplier);
    }
};

struct add0_layer {
    using InA = ap_uint<8>;
    using InB = ap_uint<8>;
    using Out = ap_uint<8>;
    using Accumulator = ap_int<30>;
    static constexpr int LANES = 1;
    static constexpr int COUNT = 528;
    static constexpr int MULTIPLIER_A = 987769;
    static constexpr int MULTIPLIER_B = 254893;
    static constexpr int OFFSET = -166423008;
    static constexpr int SHIFT = 17;
    static constexpr int LO = 184;
    static constexpr int HI = 255;
};

struct max_pool0_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    static constexpr int IN_HEIGHT = 11;
    static constexpr int IN_WIDTH = 6;
    static constexpr int IN_CHANNELS = 8;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 6;
    static constexpr int OUT_WIDTH = 6;
    static constexpr int KERNEL_Y = 2;
    static constexpr int KERNEL_X = 2;
    static constexpr int STRIDE_Y = 2;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 0;
    static constexpr int PAD_LEFT = 1;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 2;
    static constexpr int SLOTS = 2;
    static constexpr int BANKS = 1;
    static constexpr int PADDING = 184;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 8;
};

struct table0_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<5>;
    static constexpr int LANES = 1;
    static constexpr int COUNT = 288;
    static constexpr int ENTRIES = 72;
    static constexpr int FIRST = 184;
};

struct convolution2_layer {
    using In = ap_uint<5>;
    using Out = ap_uint<8>;
    using Weight = int8_t;
    using Bias = ap_int<15>;
    using Accumulator = ap_int<16>;
    using Multiplier = ap_uint<24>;
    using Product = ap_int<43>;
    static constexpr int IN_HEIGHT = 6;
    static constexpr int IN_WIDTH = 6;
    static constexpr int IN_CHANNELS = 8;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 6;
    static constexpr int OUT_WIDTH = 7;
    static constexpr int KERNEL_Y = 2;
    static constexpr int KERNEL_X = 2;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 1;
    static constexpr int PAD_LEFT = 1;
    static constexpr int DILATION_Y = 2;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 3;
    static constexpr int SLOTS = 4;
    static constexpr int BANKS = 1;
    static constexpr int PADDING = 11;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 6;
    static constexpr int SIMD = 1;
    static constexpr int STEPS = 8;
    static constexpr int SHIFT = 31;
    static constexpr int ZERO_POINT = 152;
    static constexpr int LO = 0;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<convolution2_layer>(sum, multiplier);
    }
};

struct average_pool0_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    using Accumulator = ap_int<14>;
    using Multiplier = ap_uint<21>;
    using Product = ap_int<38>;
    static constexpr int IN_HEIGHT = 6;
    static constexpr int IN_WIDTH = 7;
    static constexpr int IN_CHANNELS = 6;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 1;
    static constexpr int OUT_WIDTH = 1;
    static constexpr int KERNEL_Y = 6;
    static constexpr int KERNEL_X = 7;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 0;
    static constexpr int PAD_LEFT = 0;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 6;
    static constexpr int SLOTS = 8;
    static constexpr int BANKS = 1;
    static constexpr int PADDING = 0;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 6;
    static constexpr int OFFSET = -6384;
    static constexpr int MULTIPLIER = 1380265;
    static constexpr int SHIFT = 26;
    static constexpr int ZERO_POINT = 230;
    static constexpr int LO = 0;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<average_pool0_layer>(sum, multiplier);
    }
};

struct convolution3_layer {
    using In = ap_uint<8>;
    using Out = ap_uint<8>;
    using Weight = int8_t;
    using Bias = ap_int<17>;
    using Accumulator = ap_int<18>;
    using Multiplier = ap_uint<26>;
    using Product = ap_int<44>;
    static constexpr int IN_HEIGHT = 1;
    static constexpr int IN_WIDTH = 1;
    static constexpr int IN_CHANNELS = 6;
    static constexpr int IN_LANES = 1;
    static constexpr int OUT_HEIGHT = 1;
    static constexpr int OUT_WIDTH = 1;
    static constexpr int KERNEL_Y = 1;
    static constexpr int KERNEL_X = 1;
    static constexpr int STRIDE_Y = 1;
    static constexpr int STRIDE_X = 1;
    static constexpr int PAD_TOP = 0;
    static constexpr int PAD_LEFT = 0;
    static constexpr int DILATION_Y = 1;
    static constexpr int DILATION_X = 1;
    static constexpr int SPAN_Y = 1;
    static constexpr int SLOTS = 1;
    static constexpr int BANKS = 1;
    static constexpr int PADDING = 230;
    static constexpr int PE = 1;
    static constexpr int FOLDS = 5;
    static constexpr int SIMD = 1;
    static constexpr int STEPS = 6;
    static constexpr int SHIFT = 32;
    static constexpr int ZERO_POINT = 214;
    static constexpr int LO = 0;
    static constexpr int HI = 255;
    static Out finish(Accumulator sum, Multiplier multiplier) {
        return requantize<convolution3_layer>(sum, multiplier);
    }
};

extern "C" void trivium_top(const uint8_t* in0, uint8_t* out0, int frames) {
#pragma HLS INTERFACE m_axi port = in0 bundle = gmem0 offset = slave
#pragma HLS INTERFACE m_axi port = out0 bundle = gmem1 offset = slave
#pragma HLS INTERFACE s_axilite port = frames
#pragma HLS INTERFACE s_axilite port = return
#pragma HLS DATAFLOW
    Stream<ap_uint<8>, 3> input0_stream("input0_stream");
#pragma HLS STREAM variable = input0_stream depth = 11
    Stream<ap_uint<8>, 1> convolution0_stream("convolution0_stream");
#pragma HLS STREAM variable = convolution0_stream depth = 2
    Stream<ap_uint<8>, 1> convolution0_stream0("convolution0_stream0");
#pragma HLS STREAM variable = convolution0_stream0 depth = 528
    Stream<ap_uint<8>, 1> convolution0_stream1("convolution0_stream1");
#pragma HLS STREAM variable = convolution0_stream1 depth = 528
    Stream<ap_uint<8>, 1> convolution1_stream("convolution1_stream");
#pragma HLS STREAM variable = convolution1_stream depth = 48
    Stream<ap_uint<8>, 1> depthwise0_stream("depthwise0_stream");
#pragma HLS STREAM variable = depthwise0_stream depth = 48
    Stream<ap_uint<8>, 1> add0_stream("add0_stream");
#pragma HLS STREAM variable = add0_stream depth = 48
    Stream<ap_uint<8>, 1> max_pool0_stream("max_pool0_stream");
#pragma HLS STREAM variable = max_pool0_stream depth = 48
    Stream<ap_uint<5>, 1> table0_stream("table0_stream");
#pragma HLS STREAM variable = table0_stream depth = 48
    Stream<ap_uint<8>, 1> convolution2_stream("convolution2_stream");
#pragma HLS STREAM variable = convolution2_stream depth = 42
    Stream<ap_uint<8>, 1> average_pool0_stream("average_pool0_stream");
#pragma HLS STREAM variable = average_pool0_stream depth = 6
    Stream<ap_uint<8>, 1> convolution3_stream("convolution3_stream");
#pragma HLS STREAM variable = convolution3_stream depth = 5

    load(in0, input0_stream, frames * 121);
    convolution<convolution0_layer>(input0_stream, convolution0_stream, convolution0_weight, convolution0_bias, convolution0_multiplier, frames);
    fork(convolution0_stream, convolution0_stream0, convolution0_stream1, frames * 528);
    convolution<convolution1_layer>(convolution0_stream0, convolution1_stream, convolution1_weight, convolution1_bias, convolution1_multiplier, frames);
    depthwise<depthwise0_layer>(convolution0_stream1, depthwise0_stream, depthwise0_weight, depthwise0_bias, depthwise0_multiplier, frames);
    add<add0_layer>(convolution1_stream, depthwise0_stream, add0_stream, frames);
    max_pool<max_pool0_layer>(add0_stream, max_pool0_stream, frames);
    lookup<table0_layer>(max_pool0_stream, table0_stream, table0_table, frames);
    convolution<convolution2_layer>(table0_stream, convolution2_stream, convolution2_weight, convolution2_bias, convolution2_multiplier, frames);
    average_pool<average_pool0_layer>(convolution2_stream, average_pool0_stream, frames);
    convolution<convolution3_layer>(average_pool0_stream, convolution3_stream, convolution3_weight, convolution3_bias, convolution3_multiplier, frames);
    store(convolution3_stream, out0, frames * 5);
}
