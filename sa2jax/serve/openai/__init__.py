"""Routes with the request and response bodies of OpenAI's API."""
