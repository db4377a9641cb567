// $title: weights, biases and requantization multipliers, in the order in which the folded layers read
// them. Written by Trivium $version; edits are lost.
#pragma once

#include <ap_int.h>

#include <cstdint>

$arrays
