"""From noise and prompts to images: guidance, inverse, denoising."""
