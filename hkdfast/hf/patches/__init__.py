"""What `hkdfast.hf.apply` puts into trainers: one module for each family of them."""
