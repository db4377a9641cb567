// $title: the kernel's interface. Written by Trivium $version; edits are lost.
#pragma once

#include <cstdint>

// Runs `frames` inputs, one after the other, through the network.
//
$ports_doc
extern "C" void $top($signature);
