// A stand-in for the parts of XRT's native API that host.cpp uses: buffers in plain memory, and a
// kernel that is the C++ one. It exists to compile and run host.cpp where there is no XRT.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

enum xclBOSyncDirection { XCL_BO_SYNC_BO_TO_DEVICE, XCL_BO_SYNC_BO_FROM_DEVICE };

namespace xrt {

using uuid = std::string;

struct device {
    explicit device(unsigned) {}
    uuid load_xclbin(const std::string& path) { return path; }
};

// Host and device memory are apart: what is not synchronized is not seen.
class bo {
    struct memory {
        std::vector<char> host, device;
    };
    std::shared_ptr<memory> data;

public:
    bo(const device&, size_t size, int) : data(new memory{std::vector<char>(size), std::vector<char>(size)}) {}
    void write(const void* source) { std::memcpy(data->host.data(), source, data->host.size()); }
    void read(void* target) { std::memcpy(target, data->host.data(), data->host.size()); }
    void sync(xclBOSyncDirection way) {
        if (way == XCL_BO_SYNC_BO_TO_DEVICE) data->device = data->host;
        else data->host = data->device;
    }
    template <class T> T* on_device() const { return reinterpret_cast<T*>(data->device.data()); }
};

struct run {
    void wait() {}
};

}  // namespace xrt
