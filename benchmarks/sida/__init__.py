"""SiDA-MoE's tables (arXiv 2310.18859), reproduced with Switch Transformers: data, training, quality, speed and memory."""
