"""Where bytes lie: rows as segments, the control record, windows and the heap inside them."""
