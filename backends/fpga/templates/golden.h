// Inputs of the kernel and the outputs that it must give, bit for bit, by the interpreter of Trivium's
// integer IR. Written by Trivium $version; edits are lost.
#pragma once

#include <cstdint>

const int GOLDEN_FRAMES = $frames;

$arrays
