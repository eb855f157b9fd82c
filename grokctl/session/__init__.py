"""A run for a user: opens the job, reads prompts and settings, prints texts."""
