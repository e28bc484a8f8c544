//! Connections: how many, how long they may take, and an error body even for what is not HTTP.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::answer::Problem;

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS: usize = 2048;
/// How long the head of a request may take to arrive, also on an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Most header fields of a request.
const MAX_HEADERS: usize = 100;
/// Largest head of a request, bytes.
const MAX_HEAD: usize = 64 << 10;
/// After accept fails (out of descriptors), so that it isn't tried in a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for ever.
pub async fn serve(listener: TcpListener, router: Router) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let permit = room.clone().acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_headers(MAX_HEADERS)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(WithErrorBodies { stream, replacement: None }), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection ended badly");
            }
            drop(permit);
        });
    }
}

/// A connection on which hyper's own answers to what it can't parse (400, 414, 431 with an empty body) get the error body that
/// every other error has. Our resources never answer 4xx with an empty body, so those answers can't be mistaken.
struct WithErrorBodies {
    stream: TcpStream,
    /// What is written instead, and how far it is.
    replacement: Option<(Vec<u8>, usize)>,
}

impl WithErrorBodies {
    fn poll_replacement(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((bytes, written)) = &mut self.replacement {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &bytes[*written..]))?;
            *written += count;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if *written == bytes.len() {
                self.replacement = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The answer to write instead of a bare one; `None` if it is not bare.
fn replacement(head: &[u8]) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(head).ok()?;
    let status = head.strip_prefix("HTTP/1.1 4")?;
    if !head.ends_with("\r\n\r\n") || !head.to_ascii_lowercase().contains("\r\ncontent-length: 0\r\n") {
        return None;
    }
    let reason = match status.get(..2)? {
        "14" => "the target of the request is too long".to_owned(),
        "31" => format!("the head of the request is longer than {MAX_HEAD} bytes or has over {MAX_HEADERS} fields"),
        _ => "this is not an HTTP/1.1 request".to_owned(),
    };
    let (_, body) = Problem::Invalid(vec![reason]).render();
    let line = head.lines().next()?;
    let length = body.len();
    let fields = format!("content-type: application/json\r\ncontent-length: {length}\r\nconnection: close");
    Some(format!("{line}\r\n{fields}\r\n\r\n{body}").into_bytes())
}

impl AsyncWrite for WithErrorBodies {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.replacement.is_none() {
            self.replacement = replacement(bytes).map(|answer| (answer, 0));
            if self.replacement.is_none() {
                return Pin::new(&mut self.stream).poll_write(cx, bytes);
            }
        }
        ready!(self.poll_replacement(cx))?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A bare answer is one piece.
        match slices {
            [one] => self.poll_write(cx, one),
            _ => Pin::new(&mut self.stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for WithErrorBodies {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}
