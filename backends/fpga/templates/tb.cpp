// Test bench of the kernel. Without arguments it runs the golden data and fails unless every output
// is equal, bit for bit. With arguments it runs the kernel on files of raw integers:
//
//   tb FRAMES $usage
//
// Written by Trivium $version; edits are lost.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "golden.h"
#include "kernel.h"

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

template <class T>
static int differences(const char* name, const std::vector<T>& actual, const T* expected) {
    int wrong = 0;
    for (size_t i = 0; i < actual.size(); ++i) {
        if (actual[i] == expected[i]) continue;
        if (wrong++ < 10)
            std::printf("%s[%zu]: %d, expected %d\n", name, i, int(actual[i]), int(expected[i]));
    }
    return wrong;
}

static int golden() {
    const int frames = GOLDEN_FRAMES;
$golden_buffers
    $top($golden_arguments);
    int wrong = 0;
$golden_checks
    std::printf(wrong == 0 ? "golden: %d frames, bit-exact\n" : "golden: FAILED (%d frames)\n", frames);
    return wrong == 0 ? 0 : 1;
}

int main(int argc, char** argv) {
    if (argc == 1) return golden();
    if (argc != $argument_count) {
        std::fprintf(stderr, "usage: tb [FRAMES $usage]\n");
        return 2;
    }
    const int frames = std::atoi(argv[1]);
$file_buffers
    $top($golden_arguments);
$file_writes
    return 0;
}
