"""The HTTP edge: OpenAI's shapes outside, jobs and items inside. It knows no engine and no tokens beyond their ids."""
