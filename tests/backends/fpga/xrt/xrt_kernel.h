#pragma once
#include <type_traits>

#include "kernel.h"
#include "xrt_device.h"

namespace xrt {

// Passes the device memory of a buffer as whatever pointer the kernel takes.
struct argument {
    const bo& buffer;
    template <class T> operator T*() const { return buffer.on_device<typename std::remove_const<T>::type>(); }
};

struct kernel {
    kernel(const device&, const uuid&, const std::string&) {}
    int group_id(int index) { return index; }
    run operator()(const bo& in, const bo& out, int frames) {
        trivium_top(argument{in}, argument{out}, frames);
        return run();
    }
};

}  // namespace xrt
