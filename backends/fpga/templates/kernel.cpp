// $title, as streams of integers. Written by Trivium $version for $target; edits are lost.
//
$summary
#include "kernel.h"

#include "layers.h"
#include "weights.h"

$configurations
extern "C" void $top($signature) {
$interfaces
#pragma HLS INTERFACE s_axilite port = frames
#pragma HLS INTERFACE s_axilite port = return
#pragma HLS DATAFLOW
$streams

$calls
}
