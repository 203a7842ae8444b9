"""What is read out of an e-mail: headers, the right version of the text, attachments and what becomes of those that fail."""

import io
from base64 import b64encode
from email.message import EmailMessage

import pytest

from job_runner.document import Kind, ParsedDocument
from job_runner.readers import ReadingFailed, read
from job_runner.readers.mail import Allowance
from tests.support.docx import make_docx, paragraph, zipped
from tests.support.pdf import PdfPage, make_pdf

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def read_mail(data: bytes, allowance: Allowance | None = None) -> ParsedDocument:
    return read(io.BytesIO(data), kind=Kind.EML, name="a.eml", allowance=allowance)


def mail(text: str = "The tide is high.", *, subject: str = "Tides", html: str = "") -> EmailMessage:
    message = EmailMessage()
    message["Subject"] = subject
    message["From"] = "Ann <ann@example.com>"
    message.set_content(text)
    if html:
        message.add_alternative(html, subtype="html")
    return message


def attached(message: EmailMessage, data: bytes, name: str, kind: str = "application/octet-stream") -> EmailMessage:
    maintype, subtype = kind.split("/")
    message.add_attachment(data, maintype=maintype, subtype=subtype, filename=name)
    return message


HEAD = "Tides\n\nFrom: Ann <ann@example.com>\n\n"


def test_headers_are_text_and_the_subject_is_a_heading() -> None:
    data = (
        b"Received: from x by y\r\nSubject: =?UTF-8?B?" + b64encode("潮汐表".encode()) + b"?=\r\n =?utf-8?q?_2026?=\r\n"
        b"From: =?gb2312?B?"
        + b64encode("张三".encode("gbk"))
        + b"?= <z@example.com>\r\nTo: b@example.com,\r\n c@example.com\r\n"
        b"Cc: d@example.com\r\nDate: Fri, 27 Nov 2026 10:00:00 +0800\r\n\r\nText.\r\n"
    )
    document = read_mail(data)
    assert document.text == (
        "潮汐表 2026\n\nFrom: 张三 <z@example.com>\nTo: b@example.com, c@example.com\nCc: d@example.com\n"
        "Date: Fri, 27 Nov 2026 10:00:00 +0800\n\nText."
    )
    assert [(one.level, one.title, one.start) for one in document.headings] == [(1, "潮汐表 2026", 0)]
    assert not document.paged


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(mail(html="<p>The <b>tide</b>").as_bytes(), "The tide is high.", id="plain text before HTML"),
        pytest.param(mail(" ", html="<h1>High</h1><p>tide").as_bytes(), "High\n\ntide", id="HTML where plain is empty"),
        pytest.param(
            b"Content-Type: text/plain; charset=gb2312\n\n" + "知识库镕基".encode("gbk"),
            "知识库镕基",
            id="GB2312 that is GBK",
        ),
        pytest.param(b"X: y\n\n" + "知识库把文档切成片段。".encode("gb18030"), "知识库把文档切成片段。", id="no charset"),
        pytest.param(
            b"Content-Type: text/plain; charset=nonsense\nContent-Transfer-Encoding: base64\n\n" + b64encode("é".encode()),
            "é",
            id="a charset that is none",
        ),
        pytest.param(
            b"Content-Type: text/html; charset=iso-2022-jp\n\n<meta charset=utf-8><p>" + "日本語".encode("iso-2022-jp"),
            "日本語",
            id="HTML by the charset of the mail",
        ),
        pytest.param(
            b"Content-Type: text/plain; format=flowed\n\nThe tide \nis high.\n> quoted\n-- \nAnn",
            "The tide is high.\n> quoted\n--\nAnn",
            id="flowed",
        ),
        pytest.param(
            b'Content-Type: text/plain; format=flowed; delsp=yes; charset="utf-8"\n\n' + "潮水 \n很高。".encode(),
            "潮水很高。",
            id="flowed Chinese",
        ),
        pytest.param(
            b"Content-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\nhigh=\n tide=3D1",
            "high tide=1",
            id="qp",
        ),
        pytest.param(b"Content-Type: multipart/mixed\n\nno boundary", "no boundary", id="a multipart without a boundary"),
    ],
)
def test_text(data: bytes, text: str) -> None:
    assert read_mail(data).text.removeprefix(HEAD) == text


def test_raw_bytes_in_headers_are_taken_as_text_is() -> None:
    disposition = 'Content-Disposition: attachment; filename="潮汐表二零二六.txt"\n\n高潮。'
    data = "Subject: 知识库平台运维手册\nMIME-Version: 1.0\nContent-Type: text/plain\n".encode("gb18030")
    document = read_mail(data + disposition.encode("gb18030"))
    assert document.text == "知识库平台运维手册\n\nAttachment: 潮汐表二零二六.txt\n\n高潮。"


def test_attachments_follow_with_their_headings_and_pages() -> None:
    message = attached(
        mail(), make_pdf([PdfPage([(11, "One.")]), PdfPage([(11, "Two.")])], bookmarks=[(2, "Two.")]), "报告.pdf"
    )
    attached(message, make_docx(paragraph("Spring", style="1") + paragraph("tide")), "C:\\x\\notes.docx")
    document = read_mail(message.as_bytes())
    assert document.text == (
        f"{HEAD}The tide is high.\n\nAttachment: 报告.pdf\n\nOne.\n\nTwo.\n\nAttachment: notes.docx\n\nSpring\n\ntide"
    )
    assert [(one.level, one.title) for one in document.headings] == [
        (1, "Tides"),
        (2, "Attachment: 报告.pdf"),
        (3, "Two."),
        (2, "Attachment: notes.docx"),
        (3, "Spring"),
    ]
    assert [document.page_at(document.text.index(it)) for it in ("tide is", "报告", "One", "Two", "notes")] == [
        1,
        2,
        2,
        3,
        4,
    ]
    assert [page.number for page in document.pages] == [1, 2, 3, 4]
    assert all(document.text[one.start : one.end] == one.title for one in document.headings)


def test_an_attachment_that_fails_is_recorded_and_the_rest_is_read() -> None:
    message = attached(mail(), b"%PDF-1.7\nnothing else", "broken.pdf")
    attached(message, zipped({"a.txt": b"x"}), "a.zip")
    attached(message, make_pdf([PdfPage([(11, "One.")]), PdfPage(damaged=True)]), "half.pdf")
    attached(message, "五".encode("gbk") * 500, "五.txt", "application/msword")
    document = read_mail(message.as_bytes())
    assert "[Attachment broken.pdf was not read: the PDF is damaged or cut short]" in document.text
    assert "[Attachment a.zip was not read: it is a ZIP archive]" in document.text
    assert "One." in document.text
    assert "五" * 500 in document.text
    assert document.failed_pages == (2, 5)  # the broken one, and the second page of the other


def test_mails_in_mails() -> None:
    inner = attached(mail("Inner text.", subject="Inner"), b"deep", "deep.txt")
    outer = mail("Outer text.", subject="Outer")
    outer.add_attachment(inner)
    attached(outer, inner.as_bytes(), "inner.eml")
    document = read_mail(outer.as_bytes())
    assert document.text.count("Inner text.") == 2
    assert document.text.count("Attachment: deep.txt") == 2
    assert [(one.level, one.title) for one in document.headings][:4] == [
        (1, "Outer"),
        (2, "Attachment: Inner"),
        (3, "Inner"),
        (4, "Attachment: deep.txt"),
    ]


@pytest.mark.parametrize(
    ("allowance", "message"),
    [
        (Allowance(count=1), "[Attachment b.txt was not read: the attachments are too many or too large]"),
        (Allowance(size=5), "[Attachment b.txt was not read: the attachments are too many or too large]"),
        (Allowance(depth=2), "[Attachment Innermost was not read: too many mails are in one another]"),
    ],
)
def test_bounds_of_attachments(allowance: Allowance, message: str) -> None:
    innermost = mail("Far down.", subject="Innermost")
    inner = mail(subject="Inner")
    inner.add_attachment(innermost)
    outer = attached(attached(mail(), b"aaaa", "a.txt"), b"bbbb", "b.txt")
    outer.add_attachment(inner)
    document = read_mail(outer.as_bytes(), allowance)
    assert message in document.text
    assert document.failed_pages


def test_what_belongs_to_the_text_is_no_attachment() -> None:
    message = mail(html="<p>The tide is high.<img src='cid:logo'>")
    html = message.get_payload()[1]  # type: ignore[index]
    html.add_related(PNG, maintype="image", subtype="png", cid="<logo>")  # type: ignore[union-attr]
    signed = (
        b"Content-Type: multipart/signed; boundary=s\n\n--s\nContent-Type: text/plain\n\nSigned.\n--s\n"
        b'Content-Type: application/pkcs7-signature; name="smime.p7s"\nContent-Disposition: attachment\n\nAAAA\n--s--\n'
    )
    assert read_mail(message.as_bytes()).text == HEAD + "The tide is high."
    assert read_mail(signed).text == "Signed."


def test_a_report_of_delivery_is_read() -> None:
    data = (
        b"Subject: failure\nContent-Type: multipart/report; boundary=r\n\n--r\n\nNot delivered.\n--r\n"
        b"Content-Type: message/delivery-status\n\nReporting-MTA: dns; x\n\nFinal-Recipient: rfc822; a@b\n\n--r\n"
        b"Content-Type: message/rfc822\n\nSubject: lost\n\nLost text.\n--r--\n"
    )
    text = read_mail(data).text
    assert "Not delivered." in text
    assert "Lost text." in text


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        pytest.param(
            b"Subject: x\nContent-Type: application/pkcs7-mime; smime-type=enveloped-data\n\nAAAA",
            "DocumentUnreadable",
            "the mail is encrypted",
            id="S/MIME",
        ),
        pytest.param(
            b"Content-Type: multipart/encrypted; boundary=b\n\n--b\nContent-Type: text/plain\n\n1\n--b--",
            "DocumentUnreadable",
            "the mail is encrypted",
            id="PGP",
        ),
        pytest.param(b"From: a\nReceived: x\n\n \n", "DocumentEmpty", "neither subject, text nor attachments", id="nothing"),
        pytest.param(
            b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (it, it) for it in range(10_000)),
            "DocumentRefused",
            "more than 100 parts of the mail are in one another",
            id="10,000 parts in one another",
        ),
        pytest.param(
            b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (it, it) for it in range(150)) + b"\nx",
            "DocumentRefused",
            "more than 100 parts of the mail are in one another",
            id="150 parts in one another",
        ),
    ],
)
def test_refusals(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed) as failure:
        read_mail(data)
    assert (failure.value.reason, message in failure.value.message) == (reason, True), failure.value.message
