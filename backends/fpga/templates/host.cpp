// Runs the kernel through XRT: raw files in the model's own dtypes in, the same out.
//
//   host KERNEL.xclbin FRAMES $usage
//
// Written by Trivium $version; edits are lost.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <xrt/xrt_bo.h>
#include <xrt/xrt_device.h>
#include <xrt/xrt_kernel.h>

#include "host_ops.h"

template <class T>
static std::vector<T> read_file(const char* path, size_t count) {
    std::vector<T> values(count);
    FILE* file = std::fopen(path, "rb");
    if (file == nullptr || std::fread(values.data(), sizeof(T), count, file) != count) {
        std::fprintf(stderr, "%s: cannot read %zu values\n", path, count);
        std::exit(2);
    }
    std::fclose(file);
    return values;
}

template <class T>
static void write_file(const char* path, const std::vector<T>& values) {
    FILE* file = std::fopen(path, "wb");
    if (file == nullptr ||
        std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) {
        std::fprintf(stderr, "%s: cannot write\n", path);
        std::exit(2);
    }
    std::fclose(file);
}

int main(int argc, char** argv) {
    if (argc != $argument_count) {
        std::fprintf(stderr, "usage: host KERNEL.xclbin FRAMES $usage\n");
        return 2;
    }
    const int frames = std::atoi(argv[2]);
    xrt::device device(0);
    const auto uuid = device.load_xclbin(argv[1]);
    xrt::kernel kernel(device, uuid, "$top");

$inputs
$output_buffers
    auto run = kernel($arguments, frames);
    run.wait();
$outputs
    return 0;
}
