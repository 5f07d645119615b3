"""What a run reports while it trains: `metrics.jsonl`, trackers, progress."""
