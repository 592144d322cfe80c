"""A model behind HTTP: images in, masks out. Needs the extra `serve`.

settings.py         limits and times, and what must be installed
followed_model.py   the version that answers, and the way to the next one that its alias names
batcher.py          predicts what waits together
answer.py           the bytes of an image → the bytes of an answer
image_answers.py    the three of them in this process; ray_backend/replicas.py has them on a cluster
request_body.py     the body of a request, within its limit
service.py          token, limits, formats and figures of requests
web_app.py          the addresses, their OpenAPI description; drop_page.html is the page
web_server.py       listens, and ends when the open requests are answered
"""
