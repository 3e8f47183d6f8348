"""Scores of sets of images from their feature vectors, each with an interval and its count."""
