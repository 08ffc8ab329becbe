//! One request to the management API: HTTP/1.1 to wherever it is.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use api::{Code, Problem};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use super::cli::Connection;
use super::place::Place;

/// Longest answer that is read: that of a target with tens of thousands of namespaces.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Added to the time that a change may take.
const SLACK: Duration = Duration::from_secs(15);

/// A request.
pub(crate) struct Ask {
    pub(crate) method: Method,
    /// Path, with what follows the `?`.
    pub(crate) path: String,
    /// JSON.
    pub(crate) body: Option<String>,
}

/// Sends a request and reads the answer to it.
///
/// # Errors
/// The flags name no place, nobody answers there, or the answer is a refusal.
pub(crate) fn send<T: DeserializeOwned>(
    connection: &Connection,
    timeout: Duration,
    ask: Ask,
) -> anyhow::Result<T> {
    let place = Place::of(connection)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    let (status, bytes) = runtime.block_on(async {
        tokio::time::timeout(timeout + SLACK, exchange(&place, ask))
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer within {} s", (timeout + SLACK).as_secs())))
    })?;
    if status.is_success() {
        return serde_json::from_slice(&bytes).context("the answer makes no sense");
    }
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => Err(refusal(&problem)),
        Err(_) => bail!("the target answered with HTTP status {status}"),
    }
}

async fn exchange(place: &Place, ask: Ask) -> anyhow::Result<(hyper::StatusCode, Bytes)> {
    let stream = TokioIo::new(place.connect().await?);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(stream).await.context("management API")?;
    // It ends with the exchange, whose error says what is wrong with it.
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(ask.method)
        .uri(ask.path)
        .header("host", "penstock")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(ask.body.unwrap_or_default())))
        .context("making the request")?;
    let answer = match sender.send_request(request).await {
        Ok(answer) => answer,
        // A server judges a certificate when the client is done: it is the connection that knows.
        Err(error) => {
            return Err(match connection.await {
                Ok(Err(cause)) => place.explain(&cause),
                _ => place.explain(&error),
            });
        }
    };
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| anyhow!("reading the answer: {error}"))?;
    connection.abort();
    Ok((status, body.to_bytes()))
}

pub(crate) fn refusal(problem: &Problem) -> anyhow::Error {
    let Problem { error, what, allowed } = problem;
    // What is in force although the command failed must not be overlooked.
    let about = if *error == Code::Draining { "the change IS in force: " } else { "" };
    match allowed.as_str() {
        "" => anyhow!("{about}{what}"),
        allowed => anyhow!("{about}{what}; allowed: {allowed}"),
    }
}

/// A segment of a path, with what is special in one escaped.
pub(crate) fn segment(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut escaped, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte));
            }
            // Writing to a string does not fail.
            _ => _ = write!(escaped, "%{byte:02X}"),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cannot_leave_their_place() {
        assert_eq!(segment("db-0.a_b"), "db-0.a_b");
        assert_eq!(segment("../a?b#c d"), "..%2Fa%3Fb%23c%20d");
        assert_eq!(segment("[::1]:8009"), "%5B%3A%3A1%5D%3A8009");
    }

    #[test]
    fn a_refusal_says_what_is_allowed_and_what_is_in_force() {
        let problem = |error, allowed: &str| Problem {
            error,
            what: "no".to_owned(),
            allowed: allowed.to_owned(),
        };
        assert_eq!(refusal(&problem(Code::Invalid, "1 to 9")).to_string(), "no; allowed: 1 to 9");
        assert_eq!(refusal(&problem(Code::Draining, "")).to_string(), "the change IS in force: no");
    }

    fn connection(api: &str) -> Connection {
        Connection {
            api: api.to_owned(),
            api_cert: None,
            api_key: None,
            api_ca: None,
            json: false,
            timeout: 1,
        }
    }

    #[test]
    fn tcp_without_tls_or_a_certificate_is_refused() {
        for (api, expected) in [
            ("http://127.0.0.1:1", "no management API on TCP without TLS"),
            ("ftp://127.0.0.1:1", "allowed: the path of a socket, or https://HOST:PORT"),
            ("https://127.0.0.1:1/v1", "is no place"),
            ("https://127.0.0.1:1", "give --api-cert FILE"),
        ] {
            let ask = Ask { method: Method::GET, path: api::path::STATUS.to_owned(), body: None };
            let error = send::<api::Status>(&connection(api), Duration::from_secs(1), ask);
            let error = error.unwrap_err().to_string();
            assert!(error.contains(api) && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_socket_that_is_not_there_is_explained() {
        let ask = Ask { method: Method::GET, path: api::path::STATUS.to_owned(), body: None };
        let nowhere = connection("/nonexistent/api.sock");
        let error = send::<api::Status>(&nowhere, Duration::from_secs(1), ask).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/nonexistent/api.sock") && text.contains("--api PATH"), "{text}");
    }
}
