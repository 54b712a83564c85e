"""Takes the scripts of sphinx-thebe off every page.

Jupyter Book always brings them, for cells that run on a server from the page; this book has no
button for it.  They are there twice, so that each page told its console of an error, and name a
host that nothing here is asked of.
"""


def clean(app, page, template, context, doctree):
    """Sphinx's ``html-page-context``: what goes into one page."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}"
    ]


def setup(app):
    """As an extension."""
    app.connect("html-page-context", clean, priority=900)  # after whoever adds them
    return {"parallel_read_safe": True, "parallel_write_safe": True}
