"""Greets whoever the event names: sandbox-agent run hello.py --event '{"name": "Ada"}'"""
import platform


def handler(event):
    name = event.get("name") or "world"
    print("greeting", name)
    return {"greeting": "Hello, %s!" % name, "python": platform.python_version()}
