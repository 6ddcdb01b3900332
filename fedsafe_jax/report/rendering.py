"""Text from the Jinja templates of this package; HTML is escaped, Markdown is not."""

import functools

import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fedsafe_jax", "report/templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, **values: object) -> str:
    """Renders the template `name` with the values; raises where it asks for one not given."""
    return _environment().get_template(name).render(**values)
