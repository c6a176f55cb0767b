"""The ablation table: stage 3 with one thing changed per row."""
