"""The instruments: NVTX ranges and records of measurements."""
