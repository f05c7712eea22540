"""Requests in, result lines out.

prompt_source.py, prompt_tables.py  files of requests of every form, as rows
prompt_rules.py, chat_messages.py, own_settings.py  what a row may say
prompts.py       the whole file: checked first, then read again request by request
request.py       one prompt, and what became of it
result_lines.py, result_stream.py  how a finished request is written
tokenizer.py     from texts to token ids and back
"""
