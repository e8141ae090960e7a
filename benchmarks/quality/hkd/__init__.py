"""What HKD4VLM does to the smallest model of a chain: training the chains, the study, its tables."""
