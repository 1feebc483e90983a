"""qatbench: is post-training quantization enough, or is QAT worth its cost?"""

__version__ = "0.1.0"
