"""Vitis HLS: the C++ emitter, the project around it, and its simulation with g++."""
