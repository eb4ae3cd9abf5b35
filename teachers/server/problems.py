"""Problems (RFC 9457) as responses and in the OpenAPI document."""

from typing import Any

from starlette.responses import Response

from teachers.protocol.messages import PROBLEM, Problem
from teachers.server.admission import Rejection


def problem_response(rejection: Rejection) -> Response:
    """Return the response to a rejected request."""
    status = rejection.problem.status
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    if rejection.retry_after_s is not None:
        headers["retry-after"] = str(rejection.retry_after_s)
    if rejection.close:
        headers["connection"] = "close"
    return Response(rejection.problem.model_dump_json(), status, headers, media_type=PROBLEM)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the entries of the OpenAPI document for these status codes."""
    content = {PROBLEM: {"schema": Problem.model_json_schema()}}
    return {status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses}
