// A stand-in for Vitis's ap_int.h, for simulating the kernel with a plain C++ compiler.
//
// Integers of W <= 64 bits that wrap on assignment, as the hardware's do: an accumulator that is too
// narrow shows in the simulation. Arithmetic is done in 64 bits; the kernel assigns every result
// to a type of the width that it needs. Vitis never sees this file: it brings its own.
//
// Copyright the Trivium authors; Apache-2.0.
#pragma once

#include <cstdint>
#include <type_traits>

template <int W>
struct ap_storage {
    using type = typename std::conditional<
        (W <= 8), int8_t,
        typename std::conditional<
            (W <= 16), int16_t,
            typename std::conditional<(W <= 32), int32_t, int64_t>::type>::type>::type;
};

template <int W>
class ap_uint;

template <int W>
class ap_int {
    static_assert(W >= 1 && W <= 64, "1 to 64 bits");
    typename ap_storage<W>::type value;

    static constexpr int64_t wrap(int64_t x) {
        return static_cast<int64_t>(static_cast<uint64_t>(x) << (64 - W)) >> (64 - W);
    }

public:
    ap_int() = default;
    constexpr ap_int(int64_t x) : value(static_cast<typename ap_storage<W>::type>(wrap(x))) {}
    template <int V>
    constexpr ap_int(const ap_int<V>& x) : ap_int(static_cast<int64_t>(x)) {}
    template <int V>
    constexpr ap_int(const ap_uint<V>& x) : ap_int(static_cast<int64_t>(x)) {}
    constexpr operator int64_t() const { return value; }
    ap_int& operator+=(int64_t x) { return *this = ap_int(value + x); }
};

template <int W>
class ap_uint {
    static_assert(W >= 1 && W <= 63, "1 to 63 bits");
    typename std::make_unsigned<typename ap_storage<W>::type>::type value;

public:
    ap_uint() = default;
    constexpr ap_uint(int64_t x)
        : value(static_cast<decltype(value)>(static_cast<uint64_t>(x) &
                                             ((uint64_t(1) << W) - 1))) {}
    template <int V>
    constexpr ap_uint(const ap_int<V>& x) : ap_uint(static_cast<int64_t>(x)) {}
    template <int V>
    constexpr ap_uint(const ap_uint<V>& x) : ap_uint(static_cast<int64_t>(x)) {}
    constexpr operator int64_t() const { return static_cast<int64_t>(value); }
};
