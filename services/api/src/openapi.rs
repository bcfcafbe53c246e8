//! The OpenAPI document, from the handlers and types themselves.

use utoipa::{
    Modify, OpenApi,
    openapi::{
        ContentBuilder, HttpMethod, Ref, RefOr, ResponseBuilder,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::{
    routes::{
        audit, builds, cells, events, exec, execs, files, forks, lifecycle, logs, mcp, me, meta, orgs, ports,
        previews, promote, proxy, quotas, repl, sandboxes, snapshots,
        sockets::{commands, lsp, terminal},
        state, stats, templates, usage, volume_snapshots, volumes,
    },
    table::{ANY, Kind, REST},
    wire,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "PandaStack",
        description = "Run code that nobody trusts in a Firecracker microVM of its own.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/")),
    security(("token" = [])),
    paths(
        meta::healthz,
        meta::version,
        meta::version_v1,
        meta::metrics,
        meta::document,
        me::me,
        me::list_tokens,
        me::create_token,
        me::revoke_token,
        quotas::get,
        orgs::choose,
        orgs::list,
        orgs::get,
        orgs::members,
        templates::list,
        templates::get,
        templates::delete,
        builds::build,
        builds::list,
        builds::get,
        builds::logs,
        builds::cancel,
        sandboxes::create,
        sandboxes::list,
        sandboxes::get,
        sandboxes::delete,
        lifecycle::get,
        lifecycle::patch,
        state::pause,
        state::resume,
        state::hibernate,
        state::stop,
        state::wake,
        state::start,
        snapshots::take,
        snapshots::list,
        snapshots::get,
        snapshots::delete,
        forks::fork,
        forks::fork_tree,
        promote::promote,
        volumes::create,
        volumes::list,
        volumes::get,
        volumes::grow,
        volumes::delete,
        volume_snapshots::take,
        volume_snapshots::list,
        volume_snapshots::list_all,
        volume_snapshots::delete,
        exec::exec,
        exec::exec_stream,
        commands::exec_ws,
        terminal::ssh,
        terminal::pty,
        lsp::serve,
        lsp::languages,
        execs::list,
        execs::read,
        execs::kill,
        repl::languages,
        repl::once,
        repl::open,
        repl::list,
        repl::close,
        cells::run,
        logs::read,
        events::of_sandbox,
        events::of_workspace,
        audit::read,
        stats::boot,
        usage::of_sandbox,
        usage::overview,
        files::read,
        files::write,
        files::delete,
        files::dir,
        files::stat,
        mcp::workspace,
        mcp::workspace_root,
        mcp::sandbox,
        ports::list,
        ports::declare,
        ports::withdraw,
        proxy::proxy,
        previews::preview,
        previews::preview_token,
        previews::list,
        previews::revoke,
    ),
    components(schemas(wire::Error)),
    modifiers(&Common)
)]
struct Document;

/// The whole document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// What holds for every route with a token.
struct Common;

const EVERYWHERE: [(&str, &str); 8] = [
    ("400", "the request can never succeed as it is"),
    ("401", "no valid token"),
    ("403", "the token may not do this, or is not of the organisation that was asked for"),
    ("405", "another method is needed"),
    ("413", "the body is too large"),
    ("429", "too many requests; nothing was made"),
    ("503", "not ready or no capacity; nothing was made"),
    ("504", "no answer in time"),
];

impl Modify for Common {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("pds_ and 32 hex digits");
        if let Some(components) = &mut document.components {
            components.add_security_scheme("token", SecurityScheme::Http(scheme.build()));
        }
        for (path, item) in &mut document.paths.paths {
            // What programs in guests answer is theirs.
            let foreign = crate::table::ROUTES
                .iter()
                .any(|route| route.method == ANY && documented(route.template) == *path);
            if foreign {
                // One function serves every method; each operation needs a name of its own.
                for (method, operation) in [
                    ("get", &mut item.get),
                    ("put", &mut item.put),
                    ("post", &mut item.post),
                    ("patch", &mut item.patch),
                    ("delete", &mut item.delete),
                ] {
                    if let Some(operation) = operation {
                        operation.operation_id = Some(format!("proxy_{method}"));
                    }
                }
            }
            if foreign
                || crate::table::ROUTES
                    .iter()
                    .any(|route| route.kind == Kind::Public && route.template == path)
            {
                continue;
            }
            for operation in [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete]
                .into_iter()
                .flatten()
            {
                add_common(operation);
            }
        }
    }
}

fn add_common(operation: &mut Operation) {
    for (status, description) in EVERYWHERE {
        operation.responses.responses.entry(status.to_owned()).or_insert_with(|| {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
            RefOr::T(
                ResponseBuilder::new().description(description).content("application/json", content).build(),
            )
        });
    }
}

/// A route's path as it stands in the document, which has no word for "the rest of the path".
fn documented(template: &str) -> String {
    template.replace(REST, "{path}")
}

/// Method and path of every operation in the document.
pub fn operations() -> Vec<(&'static str, String)> {
    let document = document();
    let mut found = Vec::new();
    for (path, item) in &document.paths.paths {
        for (method, operation) in [
            (HttpMethod::Get, &item.get),
            (HttpMethod::Put, &item.put),
            (HttpMethod::Post, &item.post),
            (HttpMethod::Patch, &item.patch),
            (HttpMethod::Delete, &item.delete),
        ] {
            if operation.is_some() {
                let word = match method {
                    HttpMethod::Get => "GET",
                    HttpMethod::Put => "PUT",
                    HttpMethod::Post => "POST",
                    HttpMethod::Patch => "PATCH",
                    _ => "DELETE",
                };
                found.push((word, path.clone()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_exactly_the_routes() {
        let mut written = operations();
        let mut served: Vec<(&str, String)> = crate::table::ROUTES
            .iter()
            .flat_map(|route| {
                let every = ["GET", "PUT", "POST", "PATCH", "DELETE"];
                let methods = if route.method == ANY { every.to_vec() } else { vec![route.method] };
                methods.into_iter().map(|method| (method, documented(route.template)))
            })
            .collect();
        written.sort();
        served.sort();
        assert_eq!(written, served);
    }

    #[test]
    fn every_operation_has_a_name_of_its_own() {
        let document = serde_json::to_value(document()).unwrap();
        let paths = document["paths"].as_object().unwrap().values();
        let all: Vec<&str> = paths
            .flat_map(|item| item.as_object().unwrap().values())
            .map(|operation| operation["operationId"].as_str().unwrap())
            .collect();
        let different: std::collections::BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(all.len(), different.len());
    }

    #[test]
    fn every_reference_in_it_resolves() {
        let document = serde_json::to_value(document()).unwrap();
        let text = document.to_string();
        let mut count = 0;
        for part in text.split("\"$ref\":\"#").skip(1) {
            let pointer = part.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
            count += 1;
        }
        assert!(count > 50, "{count}");
    }
}
