"""Runs the CUDA kernels on the CPU (emulator), and what they must compute (checks, formulas)."""
