MOSEC, TRITON, KSERVE = "mosec", "triton", "kserve"
NAMES = (MOSEC, TRITON, KSERVE)
