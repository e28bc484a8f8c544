//! HTTP/1.1 by hand: a client with one connection per request that can also send nonsense, and the reader of
//! messages that the mock control plane uses on its side.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// How long a peer may stay silent. Above the 20 s that a full queue makes a request wait.
const SILENCE_LIMIT: Duration = Duration::from_secs(40);

/// Start line, headers and body of a request or an answer.
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// The first line.
    pub start_line: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, chunks already joined.
    pub body: Vec<u8>,
}

/// An answer of the agent.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Everything else.
    pub message: Message,
}

impl Message {
    /// The value of a header; the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Reads one message; `None` when the peer closed the connection before the first byte.
    pub fn read(reader: &mut impl BufRead) -> io::Result<Option<Self>> {
        let Some(start_line) = read_line(reader)? else {
            return Ok(None);
        };
        let mut message = Self { start_line, ..Self::default() };
        while let Some(line) = read_line(reader)?.filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').ok_or_else(|| malformed("header without a colon"))?;
            message.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        message.body = message.read_body(reader)?;
        Ok(Some(message))
    }

    fn read_body(&self, reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if self.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            loop {
                let size = read_line(reader)?.ok_or_else(|| malformed("end of stream between chunks"))?;
                let size = u64::from_str_radix(size.trim(), 16).map_err(|_| malformed("chunk size"))?;
                reader.by_ref().take(size).read_to_end(&mut body)?;
                read_line(reader)?;
                if size == 0 {
                    return Ok(body);
                }
            }
        }
        if let Some(length) = self.header("content-length") {
            body.resize(length.parse().map_err(|_| malformed("content-length"))?, 0);
            reader.read_exact(&mut body)?;
        } else if self.start_line.starts_with("HTTP/") {
            reader.read_to_end(&mut body)?;
        }
        Ok(body)
    }
}

impl Response {
    /// The body as JSON; panics with the answer when it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.message.body)
            .unwrap_or_else(|error| panic!("{} is answered with no JSON ({error}): {}", self.status, self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.message.body).into_owned()
    }
}

/// `GET path`.
pub fn get(address: SocketAddr, path: &str) -> io::Result<Response> {
    request(address, "GET", path, &[], b"")
}

/// `POST path` with a JSON body.
pub fn post(address: SocketAddr, path: &str, body: &Value) -> io::Result<Response> {
    request(address, "POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
}

/// Any well-formed request.
pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let answer = send_raw(address, &encode(method, path, headers, body))?;
    answer.ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionAborted, "closed without an answer"))
}

/// The bytes of a well-formed request.
pub fn encode(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Sends bytes as they are; `None` when the agent closed the connection without an answer.
///
/// The agent may answer and close before it has read everything: failing to write the rest is no error here.
pub fn send_raw(address: SocketAddr, bytes: &[u8]) -> io::Result<Option<Response>> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    stream.set_write_timeout(Some(SILENCE_LIMIT))?;
    let mut writer = stream.try_clone()?;
    let sending = bytes.to_owned();
    let sender = std::thread::spawn(move || writer.write_all(&sending));
    let answer = read_response(&mut io::BufReader::new(&stream));
    stream.shutdown(Shutdown::Both).ok();
    sender.join().expect("the sending thread").ok();
    answer
}

/// Sends bytes, says that no more will come, and reads what comes back.
pub fn send_and_close(address: SocketAddr, bytes: &[u8]) -> io::Result<Option<Response>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    read_response(&mut io::BufReader::new(&stream))
}

fn read_response(reader: &mut impl BufRead) -> io::Result<Option<Response>> {
    let Some(message) = Message::read(reader)? else {
        return Ok(None);
    };
    let status = message.start_line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| malformed("status line"))?;
    Ok(Some(Response { status, message }))
}

/// One line without its end; `None` at the end of the stream.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if reader.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    while line.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
        line.pop();
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed {what}"))
}
