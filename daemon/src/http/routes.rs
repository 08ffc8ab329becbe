//! Paths and methods of version 1, and what stands between them and the [`Manager`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{Code, Done, Problem};
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::devices::Book;
use crate::manage::{Gate, Manager};

/// How long the body of a request may take.
const BODY_TIME: Duration = Duration::from_secs(10);

#[derive(Clone)]
struct App {
    manager: Arc<Manager>,
    /// Held from the beginning of a change to its end, also if nobody waits for it any more.
    changing: Arc<Mutex<()>>,
}

/// What may follow the `?`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// Seconds to wait for a change.
    timeout: Option<u64>,
    /// Of a referral.
    addr: Option<String>,
    /// Of keys.
    host: Option<String>,
}

/// What an emulator answers: its devices, whose keys and namespaces change at run time.
pub(crate) fn devices(book: Arc<Book>) -> Router {
    Router::new()
        .route(api::path::DEVICES, get(list_devices))
        .route("/v1/devices/{name}", get(device))
        .route("/v1/devices/{name}/keys", put(set_device_keys))
        .route("/v1/devices/{name}/namespaces", post(attach_namespace))
        .route("/v1/devices/{name}/namespaces/{nsid}", delete(detach_namespace))
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .with_state(book)
}

async fn list_devices(State(book): State<Arc<Book>>) -> Answer {
    blocking(move || Ok(book.list())).await
}

async fn device(State(book): State<Arc<Book>>, path: Name) -> Answer {
    let name = name(path)?;
    blocking(move || book.device(&name)).await
}

async fn set_device_keys(State(book): State<Arc<Book>>, path: Name, request: Request) -> Answer {
    let name = name(path)?;
    let body: api::SetDeviceKeys = body(request).await?;
    blocking(move || book.set_keys(&name, &body)).await
}

async fn attach_namespace(
    State(book): State<Arc<Book>>,
    path: Name,
    query: Asked,
    request: Request,
) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::AttachNamespace = body(request).await?;
    blocking(move || book.attach(&name, body.nsid, patience)).await
}

async fn detach_namespace(
    State(book): State<Arc<Book>>,
    path: Result<Path<(String, u32)>, PathRejection>,
    query: Asked,
) -> Answer {
    let Path((name, nsid)) = path.map_err(|error| refuse(Code::Invalid, error.body_text(), ""))?;
    asked(query)?;
    blocking(move || book.detach(&name, nsid)).await
}

pub(crate) fn router(manager: Arc<Manager>) -> Router {
    let app = App { manager, changing: Arc::new(Mutex::new(())) };
    Router::new()
        .route(api::path::STATUS, get(status))
        .route(api::path::VOLUMES, get(volumes).post(attach))
        .route("/v1/volumes/{name}", get(volume).delete(detach))
        .route("/v1/volumes/{name}/resize", post(resize))
        .route("/v1/volumes/{name}/hosts", put(volume_hosts))
        .route("/v1/volumes/{name}/ana-group", put(move_volume))
        .route("/v1/volumes/{name}/write-protect", put(write_protect))
        .route(api::path::SUBSYSTEMS, get(subsystems).post(add_subsystem))
        .route("/v1/subsystems/{name}", get(subsystem).delete(remove_subsystem))
        .route("/v1/subsystems/{name}/hosts", put(subsystem_hosts))
        .route(api::path::ANA, put(ana))
        .route(api::path::DISCONNECT, post(disconnect))
        .route(
            api::path::REFERRALS,
            get(referrals).put(set_referrals).post(add_referral).delete(remove_referral),
        )
        .route(api::path::KEYS, get(keys).post(add_key))
        .route("/v1/keys/{name}", delete(remove_key))
        .route("/v1/keys/{name}/rotate", post(rotate_key))
        .route(api::path::EXPORT_KEYS, post(export_keys))
        .route(api::path::BREAKDOWN, get(breakdown).put(set_sampling))
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .with_state(app)
}

/// An answer in JSON.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// A refusal on its way out.
struct Refusal(Problem);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.error {
            Code::Invalid => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::Method => StatusCode::METHOD_NOT_ALLOWED,
            Code::Conflict => StatusCode::CONFLICT,
            Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Code::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Code::Pending | Code::Draining => StatusCode::GATEWAY_TIMEOUT,
            Code::Failed | Code::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
        };
        json(status, &self.0)
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Refusal {
        Refusal(problem)
    }
}

fn refuse(error: Code, what: impl Into<String>, allowed: impl Into<String>) -> Refusal {
    Refusal(Problem { error, what: what.into(), allowed: allowed.into() })
}

type Answer = Result<Response, Refusal>;
type Name = Result<Path<String>, PathRejection>;
type Asked = Result<Query<Parameters>, QueryRejection>;

async fn no_path(request: Request) -> Answer {
    Err(refuse(
        Code::NotFound,
        format!("there is no path {:?}", request.uri().path()),
        "the paths of docs/management.md, beginning with /v1/",
    ))
}

async fn no_method(request: Request) -> Answer {
    Err(refuse(
        Code::Method,
        format!("{} does not take {}", request.uri().path(), request.method()),
        "the methods of docs/management.md",
    ))
}

fn name(name: Name) -> Result<String, Refusal> {
    let Path(name) = name.map_err(|error| refuse(Code::Invalid, error.body_text(), ""))?;
    Ok(name)
}

fn asked(asked: Asked) -> Result<(Duration, Option<String>), Refusal> {
    let allowed = format!("timeout=SECONDS, 1 to {}", api::TIMEOUT_S_MAX);
    let Query(asked) = asked.map_err(|error| {
        refuse(Code::Invalid, format!("after the ?: {}", error.body_text()), allowed.clone())
    })?;
    let seconds = asked.timeout.unwrap_or(api::TIMEOUT_S);
    if !(1..=api::TIMEOUT_S_MAX).contains(&seconds) {
        return Err(refuse(Code::Invalid, format!("timeout={seconds}"), allowed));
    }
    Ok((Duration::from_secs(seconds), asked.addr))
}

/// Reads and parses a body within its bounds.
async fn body<T: DeserializeOwned>(request: Request) -> Result<T, Refusal> {
    let allowed = || format!("at most {} bytes", api::BODY_BYTES_MAX);
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > api::BODY_BYTES_MAX as u64) {
        return Err(refuse(Code::TooLarge, "the body is too long", allowed()));
    }
    let read = axum::body::to_bytes(request.into_body(), api::BODY_BYTES_MAX);
    let bytes = match tokio::time::timeout(BODY_TIME, read).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            let is_long = std::error::Error::source(&error)
                .is_some_and(|source| source.to_string().contains("length limit"));
            return Err(match is_long {
                true => refuse(Code::TooLarge, "the body is too long", allowed()),
                false => refuse(Code::Invalid, format!("reading the body: {error}"), ""),
            });
        }
        Err(_) => {
            return Err(refuse(
                Code::TooSlow,
                "the body did not arrive in time",
                format!("at most {} s", BODY_TIME.as_secs()),
            ));
        }
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        refuse(Code::Invalid, format!("the body: {error}"), "the JSON of docs/management.md")
    })
}

/// Asks on a thread that may block.
async fn ask<T: Serialize + Send + 'static>(
    app: App,
    question: impl FnOnce(&Manager) -> Result<T, Problem> + Send + 'static,
) -> Answer {
    let manager = app.manager;
    blocking(move || question(&manager)).await
}

async fn blocking<T: Serialize + Send + 'static>(
    question: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Answer {
    let answer = tokio::task::spawn_blocking(question).await;
    let value = answer.map_err(|error| refuse(Code::Failed, error.to_string(), ""))??;
    Ok(json(StatusCode::OK, &value))
}

/// Makes a change, one at a time, and waits for it for as long as the caller does.
async fn change(
    app: App,
    patience: Duration,
    work: impl FnOnce(&Manager, &Gate) -> Result<Done, Problem> + Send + 'static,
) -> Answer {
    let begun = Instant::now();
    let turn = tokio::time::timeout(patience, app.changing.lock_owned()).await.map_err(|_| {
        refuse(
            Code::Busy,
            format!(
                "another change has not ended after {} s; nothing was changed",
                patience.as_secs()
            ),
            "try again later, or with a longer timeout",
        )
    })?;
    let gate = Arc::new(Gate::default());
    let done = tokio::task::spawn_blocking({
        let (manager, gate) = (app.manager, gate.clone());
        move || {
            let _turn = turn;
            work(&manager, &gate)
        }
    });
    let left = patience.saturating_sub(begun.elapsed());
    match tokio::time::timeout(left, done).await {
        Ok(Ok(done)) => Ok(json(StatusCode::OK, &done?)),
        Ok(Err(error)) => Err(refuse(Code::Failed, error.to_string(), "")),
        Err(_) if gate.is_in_force() => Err(refuse(
            Code::Draining,
            format!(
                "the change is in force, and I/O admitted before it has not ended after {} s",
                patience.as_secs()
            ),
            "wait, and look at the disk that does not answer",
        )),
        Err(_) => Err(refuse(
            Code::Pending,
            format!("the change is still being prepared after {} s", patience.as_secs()),
            "ask for the status to see whether it was made",
        )),
    }
}

async fn status(State(app): State<App>) -> Answer {
    ask(app, |manager| Ok(manager.status())).await
}

async fn volumes(State(app): State<App>) -> Answer {
    ask(app, |manager| Ok(manager.volumes())).await
}

async fn volume(State(app): State<App>, path: Name) -> Answer {
    let name = name(path)?;
    ask(app, move |manager| manager.volume(&name)).await
}

async fn attach(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::AttachVolume = body(request).await?;
    change(app, patience, move |manager, gate| manager.attach(gate, &body)).await
}

async fn detach(State(app): State<App>, path: Name, query: Asked) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    change(app, patience, move |manager, gate| manager.detach(gate, &name)).await
}

async fn resize(State(app): State<App>, path: Name, query: Asked, request: Request) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::ResizeVolume = body(request).await?;
    change(app, patience, move |manager, gate| manager.resize(gate, &name, &body)).await
}

async fn volume_hosts(
    State(app): State<App>,
    path: Name,
    query: Asked,
    request: Request,
) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::SetHosts = body(request).await?;
    change(app, patience, move |manager, gate| manager.set_volume_hosts(gate, &name, &body)).await
}

async fn move_volume(State(app): State<App>, path: Name, query: Asked, request: Request) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::MoveVolume = body(request).await?;
    change(app, patience, move |manager, gate| manager.move_volume(gate, &name, &body)).await
}

async fn write_protect(
    State(app): State<App>,
    path: Name,
    query: Asked,
    request: Request,
) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::SetWriteProtect = body(request).await?;
    change(app, patience, move |manager, gate| manager.set_write_protect(gate, &name, &body)).await
}

async fn subsystems(State(app): State<App>) -> Answer {
    ask(app, |manager| Ok(manager.subsystems())).await
}

async fn subsystem(State(app): State<App>, path: Name) -> Answer {
    let name = name(path)?;
    ask(app, move |manager| manager.subsystem(&name)).await
}

async fn add_subsystem(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::AddSubsystem = body(request).await?;
    change(app, patience, move |manager, gate| manager.add_subsystem(gate, &body)).await
}

async fn remove_subsystem(State(app): State<App>, path: Name, query: Asked) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    change(app, patience, move |manager, gate| manager.remove_subsystem(gate, &name)).await
}

async fn subsystem_hosts(
    State(app): State<App>,
    path: Name,
    query: Asked,
    request: Request,
) -> Answer {
    let (name, (patience, _)) = (name(path)?, asked(query)?);
    let body: api::SetHosts = body(request).await?;
    change(app, patience, move |manager, gate| manager.set_subsystem_hosts(gate, &name, &body))
        .await
}

async fn ana(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::SetAna = body(request).await?;
    change(app, patience, move |manager, gate| manager.set_ana(gate, &body)).await
}

async fn disconnect(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::DisconnectHost = body(request).await?;
    change(app, patience, move |manager, gate| manager.disconnect(gate, &body)).await
}

async fn referrals(State(app): State<App>) -> Answer {
    ask(app, |manager| Ok(manager.referrals())).await
}

async fn breakdown(State(app): State<App>) -> Answer {
    ask(app, |manager| Ok(manager.breakdown())).await
}

async fn set_sampling(State(app): State<App>, request: Request) -> Answer {
    let body: api::SetSampling = body(request).await?;
    ask(app, move |manager| Ok(manager.set_sampling(&body))).await
}

async fn set_referrals(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::SetReferrals = body(request).await?;
    change(app, patience, move |manager, gate| manager.set_referrals(gate, &body)).await
}

async fn add_referral(State(app): State<App>, query: Asked, request: Request) -> Answer {
    let (patience, _) = asked(query)?;
    let body: api::AddReferral = body(request).await?;
    change(app, patience, move |manager, gate| manager.add_referral(gate, &body)).await
}

async fn remove_referral(State(app): State<App>, query: Asked) -> Answer {
    let (patience, addr) = asked(query)?;
    let Some(addr) = addr else {
        return Err(refuse(Code::Invalid, "which referral?", "?addr=ADDR:PORT"));
    };
    change(app, patience, move |manager, gate| manager.remove_referral(gate, &addr)).await
}

async fn keys(State(app): State<App>, query: Asked) -> Answer {
    let Query(parameters) =
        query.map_err(|error| refuse(Code::Invalid, error.body_text(), "?host=NQN"))?;
    ask(app, move |manager| Ok(manager.keys().list(parameters.host.as_deref()))).await
}

async fn add_key(State(app): State<App>, request: Request) -> Answer {
    let body: api::AddKey = body(request).await?;
    ask(app, move |manager| manager.keys().add(&body)).await
}

async fn remove_key(State(app): State<App>, path: Name) -> Answer {
    let name = name(path)?;
    ask(app, move |manager| manager.keys().remove(&name)).await
}

async fn rotate_key(State(app): State<App>, path: Name, request: Request) -> Answer {
    let name = name(path)?;
    let body: api::RotateKey = body(request).await?;
    ask(app, move |manager| manager.keys().rotate(&name, &body)).await
}

async fn export_keys(State(app): State<App>, request: Request) -> Answer {
    let body: api::ExportKeys = body(request).await?;
    ask(app, move |manager| manager.keys().export(&body)).await
}
