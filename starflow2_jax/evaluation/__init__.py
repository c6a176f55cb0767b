"""Evaluation of trained models: likelihoods, codecs, question answering, samples and reports."""
