"""What SEED does to the base models: training the bases, the study, its tables."""
