"""From a sample to token ids: prompt, response, closing tokens, and byte spans. `align` comes first."""
