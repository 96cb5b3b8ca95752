from hf_ext.metrics.decoding import distinct_ngrams, first_difference, ngram_overlap, tokens_per_step


__all__ = ["distinct_ngrams", "first_difference", "ngram_overlap", "tokens_per_step"]
