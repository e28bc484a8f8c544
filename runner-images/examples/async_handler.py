"""An async handler with its context: works on all items at once, and stops before its deadline."""
import asyncio
import hashlib


async def digest(text, rounds):
    data = text.encode()
    for number in range(rounds):
        data = hashlib.sha256(data).digest()
        if number % 1000 == 0:
            await asyncio.sleep(0)  # lets the others on
    return text, data.hex()


async def handler(event, context):
    texts = event.get("texts") or ["alpha", "beta", "gamma"]
    rounds = int(event.get("rounds", 20000))
    left = max(0.1, context.remaining_ms() / 1000 - 0.5)
    tasks = [asyncio.ensure_future(digest(text, rounds)) for text in texts]
    done, late = await asyncio.wait(tasks, timeout=left)
    for task in late:
        task.cancel()
    print(context.execution_id, "finished", len(done), "of", len(tasks))
    return {"digests": dict(sorted(task.result() for task in done)), "unfinished": len(late)}
