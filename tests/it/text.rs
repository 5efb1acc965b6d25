//! Prompts and captions as text, with the real LLaMA-3 tokenizer, against transformers
//! (`scripts/golden/make_text.py`).

use recaption::export::PromptSettings;
use recaption::model::prompt::{DEFAULT_PROMPT, DEFAULT_PROMPT_TOKENS, Preset};
use recaption::model::{Prompt, TemplateChoice, Tokenizer};
use serde_json::Value;

use crate::support::{fetched, integers, read_json, root};

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&fetched("llama3/tokenizer.json")).unwrap()
}

fn settings() -> PromptSettings {
    PromptSettings {
        chat_template: None,
        image_token: "<image>".to_owned(),
        bos_token: Some("<|begin_of_text|>".to_owned()),
        eos_token: None,
    }
}

fn as_ids(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}

#[test]
fn presets_give_the_ids_of_transformers_with_one_bos() {
    let (tokenizer, settings) = (tokenizer(), settings());
    let bos = i64::from(tokenizer.token_id("<|begin_of_text|>").unwrap());
    let goldens = read_json(&root("tests/data/text/llama3.json"));
    let goldens = goldens["templates"].as_array().unwrap();
    for golden in goldens {
        let template: TemplateChoice = golden["template"].as_str().unwrap().parse().unwrap();
        let text = golden["prompt"].as_str().unwrap();
        let prompt = Prompt::build(text, Some(&template), &settings, &tokenizer).unwrap();
        assert_eq!(prompt.rendered, golden["rendered"].as_str().unwrap());
        assert_eq!(as_ids(&prompt.before), integers(&golden["before_ids"]), "{text}");
        assert_eq!(as_ids(&prompt.after), integers(&golden["after_ids"]), "{text}");
        let all = [prompt.before, prompt.after].concat();
        assert_eq!(as_ids(&all).iter().filter(|&&id| id == bos).count(), 1, "{text}");
    }
    let presets_covered = |preset: &Preset| goldens.iter().any(|golden| golden["template"] == preset.name());
    assert!(Preset::ALL.iter().all(presets_covered));
}

/// What `plan` and `inspect` count where nobody says is what a run over a LLaMA-3 checkpoint reads.
#[test]
fn the_default_prompt_takes_as_many_tokens_as_are_planned_for() {
    let goldens = read_json(&root("tests/data/text/llama3.json"));
    let is_default =
        |golden: &&Value| golden["template"] == Preset::LlavaPpLlama3.name() && golden["prompt"] == DEFAULT_PROMPT;
    let golden = goldens["templates"].as_array().unwrap().iter().find(is_default).unwrap();
    let num_tokens = integers(&golden["before_ids"]).len() + integers(&golden["after_ids"]).len();
    assert_eq!(num_tokens, DEFAULT_PROMPT_TOKENS as usize);
}

#[test]
fn a_tokenizer_that_is_broken_inside_is_an_error() {
    let whole = std::fs::read_to_string(root("fuzz/seeds/tokenizer/tiny.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let open = |json: &str| {
        std::fs::write(&path, json).unwrap();
        Tokenizer::open(&path).map(|_| ()).map_err(|error| error.to_string())
    };
    open(&whole).unwrap();
    let decoder = whole.find(r#""decoder""#).unwrap();
    let brace = decoder + whole[decoder..].find('{').unwrap();
    // Of both the library itself makes a panic: of what is not JSON, and of a normaliser's tables that are none.
    let cut = open(&format!("{}{{,{}", &whole[..brace], &whole[brace + 1..])).unwrap_err();
    assert!(cut.contains("tokenizer.json") && cut.contains("line"), "{cut}");
    let mut json: Value = serde_json::from_str(&whole).unwrap();
    json["normalizer"] = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": 7});
    let tables = open(&json.to_string()).unwrap_err();
    assert!(tables.contains("tokenizer.json") && tables.contains("panicked"), "{tables}");
}

#[test]
fn detokenising_equals_transformers() {
    let tokenizer = tokenizer();
    let goldens = read_json(&root("tests/data/text/llama3.json"));
    let cases = goldens["decode"].as_array().unwrap();
    assert!(cases.len() >= 60);
    let mut num_split = 0;
    for case in cases {
        let ids: Vec<u32> = integers(&case["ids"]).into_iter().map(|id| id as u32).collect();
        let expected = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), expected, "{}: {ids:?}", case["case"]);
        num_split += usize::from(expected.contains('\u{fffd}'));
    }
    assert!(num_split > 0, "no case ends within a character");
}

#[test]
fn a_template_file_without_an_image_is_refused_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.jinja");
    std::fs::write(&path, "nothing here").unwrap();
    let choice = TemplateChoice::File(path);
    let error = Prompt::build("hi", Some(&choice), &settings(), &tokenizer()).unwrap_err();
    assert!(error.to_string().contains("expected one `<image>` in the rendered prompt, got 0"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn a_missing_bos_is_added_and_a_doubled_one_removed() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let bos = tokenizer.token_id("<|begin_of_text|>").unwrap();
    for start in ["", "<|begin_of_text|>", "<|begin_of_text|><|begin_of_text|>"] {
        let path = folder.path().join("template.jinja");
        std::fs::write(&path, format!("{start}A <image>")).unwrap();
        let prompt = Prompt::build("hi", Some(&TemplateChoice::File(path)), &settings(), &tokenizer).unwrap();
        let count = prompt.before.iter().filter(|&&id| id == bos).count();
        assert_eq!((count, prompt.before[0]), (1, bos), "{start}");
    }
}

#[test]
fn goldens_are_not_empty() {
    let goldens: Value = read_json(&root("tests/data/text/llama3.json"));
    assert!(goldens["templates"].as_array().unwrap().len() >= Preset::ALL.len());
}
