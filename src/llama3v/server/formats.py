"""What a request says about the form of its answer: the JSON schema that the engine has to obey."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from llama3v.engines.grammar import fault_of, is_installed, schema_text
from llama3v.server.errors import refused
from llama3v.server.schema import ChatRequest, JsonObjectFormat, JsonSchemaFormat

_ANY_OBJECT = '{"type": "object"}'


class Formats:
    """Checks schemas, one at a time: each that is new costs a process and, where it is made to, two seconds of a core."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama3v-schemas")

    async def schema_of(self, request: ChatRequest) -> str | None:
        """The schema that the answer has to obey; None: any text will do. Raises ApiError (400) where that cannot be."""
        asked = request.response_format
        if not isinstance(asked, JsonObjectFormat | JsonSchemaFormat):
            return None
        if not is_installed():
            raise refused(
                "This server was installed without what a JSON answer needs (llguidance).",
                code="unsupported_parameter",
                param="response_format",
            )
        schema = _ANY_OBJECT if isinstance(asked, JsonObjectFormat) else schema_text(asked.json_schema.content)
        fault = await asyncio.get_running_loop().run_in_executor(self._pool, fault_of, schema)
        if fault:
            message = f"The JSON schema cannot be obeyed: {fault}."
            raise refused(message, code="invalid_json_schema", param="response_format")
        return schema

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
