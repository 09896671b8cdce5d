"""`ptm report`: what runs and studies say, from their folders alone.

`options` (flags), `reading` (the files of a run), `results` (the numbers of a study), `runs`, `study` and `compare` (each makes a Document), `document` (what a report
says, whatever it is written as), `text` (terminal, Markdown, LaTeX, CSV), `page` (HTML) and `command`.
"""
