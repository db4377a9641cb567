// What the host does around the kernel, as ONNX defines it: quantize and dequantize in float32, Softmax,
// and the order of axes. The same as host_ops.py.
//
// Copyright the Trivium authors; Apache-2.0.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace host {

// QuantizeLinear: round half to even, saturate.
template <class T>
std::vector<T> quantize(const std::vector<float>& x, float scale, int zero_point) {
    std::vector<T> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        const float step = std::nearbyint(x[i] / scale) + float(zero_point);
        y[i] = static_cast<T>(std::min(std::max(step, float(std::numeric_limits<T>::min())),
                                       float(std::numeric_limits<T>::max())));
    }
    return y;
}

// DequantizeLinear with one scale, or one for each value of the last axis.
template <class T>
std::vector<float> dequantize(const std::vector<T>& x, const std::vector<float>& scales,
                              int zero_point) {
    std::vector<float> y(x.size());
    for (size_t i = 0; i < x.size(); ++i)
        y[i] = float(int64_t(x[i]) - zero_point) * scales[i % scales.size()];
    return y;
}

// Softmax of each run of `classes` values.
inline std::vector<float> softmax(std::vector<float> x, size_t classes) {
    for (size_t start = 0; start < x.size(); start += classes) {
        float* row = &x[start];
        const float largest = *std::max_element(row, row + classes);
        float sum = 0;
        for (size_t i = 0; i < classes; ++i) sum += row[i] = std::exp(row[i] - largest);
        for (size_t i = 0; i < classes; ++i) row[i] /= sum;
    }
    return x;
}

using Shape = std::array<size_t, 3>;  // height, width, channels

// Where the values of a model's tensor lie on the kernel's stream. `order` names the axes (0 channels,
// 1 height, 2 width) in the model's order; the stream's is height, width, channels.
inline std::vector<size_t> positions(Shape image, std::array<int, 3> order) {
    const size_t size[3] = {image[2], image[0], image[1]};
    const size_t stride[3] = {1, image[1] * image[2], image[2]};
    std::vector<size_t> result;
    for (size_t i = 0; i < size[order[0]]; ++i)
        for (size_t j = 0; j < size[order[1]]; ++j)
            for (size_t k = 0; k < size[order[2]]; ++k)
                result.push_back(i * stride[order[0]] + j * stride[order[1]] +
                                 k * stride[order[2]]);
    return result;
}

// Model order to stream order, frame by frame.
template <class T>
std::vector<T> to_stream(const std::vector<T>& x, Shape image, std::array<int, 3> order) {
    const std::vector<size_t> where = positions(image, order);
    std::vector<T> y(x.size());
    for (size_t i = 0; i < x.size(); ++i)
        y[i / where.size() * where.size() + where[i % where.size()]] = x[i];
    return y;
}

// Stream order to model order, frame by frame.
template <class T>
std::vector<T> from_stream(const std::vector<T>& x, Shape image, std::array<int, 3> order) {
    const std::vector<size_t> where = positions(image, order);
    std::vector<T> y(x.size());
    for (size_t i = 0; i < x.size(); ++i)
        y[i] = x[i / where.size() * where.size() + where[i % where.size()]];
    return y;
}

}  // namespace host
