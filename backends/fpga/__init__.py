"""Vitis HLS projects for AMD FPGAs, by way of an integer dataflow IR of our own."""
