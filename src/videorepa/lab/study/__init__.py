"""The study: trains arms, generates from them, scores their clips and tabulates the scores."""
