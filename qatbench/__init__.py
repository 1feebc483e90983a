"""qatbench: is post-training quantization enough, or is quantization-aware training worth its cost?"""

__version__ = "0.1.0"
