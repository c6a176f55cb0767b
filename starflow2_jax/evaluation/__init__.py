"""What a trained model is worth: likelihoods with their protocol, and a run's report."""
