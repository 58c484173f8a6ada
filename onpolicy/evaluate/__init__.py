"""What was transferred: the student beside its teacher on prompts it never trained on."""
