// A stand-in for Vitis's hls_stream.h, for simulating the kernel with a plain C++ compiler: a queue
// without a limit that fails when an empty one is read. Vitis brings its own.
//
// Copyright the Trivium authors; Apache-2.0.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <deque>

namespace hls {

template <class T>
class stream {
    std::deque<T> queue;
    const char* name;

public:
    explicit stream(const char* name = "stream") : name(name) {}
    stream(const stream&) = delete;

    // What is left over means that two layers disagree about the size of an image.
    ~stream() {
        if (!queue.empty()) {
            std::fprintf(stderr, "%s: %zu values left over\n", name, queue.size());
            std::abort();
        }
    }

    void write(const T& value) { queue.push_back(value); }

    T read() {
        if (queue.empty()) {
            std::fprintf(stderr, "%s: read while empty\n", name);
            std::abort();
        }
        T value = queue.front();
        queue.pop_front();
        return value;
    }
};

}  // namespace hls
