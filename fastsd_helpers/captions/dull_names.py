"""Names of photos and folders that say nothing of what they show: given by cameras, programs and systems.

Each is a regular expression to be matched whole, on a name in lower case.
"""

import re

__all__ = ["PICTURE_WORD", "PLAIN_FOLDER", "PROGRAM"]

# What systems call a screenshot, in the languages they are set to.
_SCREENSHOTS = (
    r"screenshot|screen shot|screenshots|screen recording|screencapture|screen capture|bildschirmfoto|"
    r"bildschirmaufnahme|capture d'écran|capture écran|captura de pantalla|captura de tela|captura de ecrã|"
    r"schermata|istantanea|schermafbeelding|schermopname|skärmavbild|skärmbild|skjermbilde|skærmbillede|"
    r"näyttökuva|zrzut ekranu|снимок экрана|скриншот|знімок екрана|スクリーンショット|屏幕截图|屏幕快照|截屏|"
    r"截图|螢幕截圖|螢幕快照|截圖|스크린샷|화면 캡처|ekran görüntüsü|ekran alıntısı|képernyőfotó|képernyőkép|"
    r"snímek obrazovky|snímka obrazovky|captură de ecran|στιγμιότυπο|צילום מסך|لقطة شاشة|لقطة الشاشة|ภาพหน้าจอ|"
    r"ภาพถ่ายหน้าจอ|ảnh chụp màn hình|tangkapan layar"
)
_PROGRAMS = (
    r"whatsapp|signal|telegram|snapchat|viber|wechat|line|kakaotalk|messenger|discord|instagram|facebook|"
    r"fb img|mmexport|wx camera|微信图片|qq图片|received|inbound|snapseed|picsart|b612|vsco|inshot|remini|"
    r"faceapp|polish|comfyui|chatgpt image|gemini generated image|tmp|temp|pexels|pxl|mvimg"
)
PROGRAM = re.compile(rf"(?:(?:{_SCREENSHOTS})|(?:{_PROGRAMS})(?=[\s\d]))(?![^\W\d_]).*")

# What in many languages is only what every file here is.
PICTURE_WORD = re.compile(
    r"img|imge|imag|image|images|dsc|dscn|dscf|pxl|mvimg|pano|vid|mov|gopr|dji|cimg|hpim|fb|photo|photos|"
    r"picture|pictures|pic|pics|foto|fotos|fotografie|fotografia|fotografía|imagen|imagenes|imágenes|immagine|"
    r"immagini|imagem|imagens|bild|bilder|afbeelding|afbeeldingen|obraz|obrazek|zdjęcie|zdjęcia|obrázek|kép|"
    r"kuva|bilde|billede|görsel|resim|fotoğraf|изображение|изображения|фото|фотография|снимок|картинка|"
    r"зображення|εικόνα|φωτογραφία|תמונה|صورة|写真|画像|图片|照片|图像|圖片|相片|이미지|사진|รูปภาพ|gambar|"
    r"heic|heif|jpg|jpeg|png|webp|web|gif|tif|tiff|bmp|avif|raw|rgb|rgba|cmyk|exif|removedbg|removebg|nobg|"
    r"crop|cropped|edit|edited|burst|hdr|copy|download|downloads|untitled|unnamed|unknown|noname|file|scan|"
    r"unbenannt|無題|名称未設定|未命名|wa|at|am|pm|no|nr|n|v|frame"
)

PLAIN_FOLDER = re.compile(
    r"photo|photos|picture|pictures|pic|pics|image|images|img|imgs|foto|fotos|bilder|train|training|trainset|"
    r"dataset|data|set|instance|instances|instance_images|class|reg|regularization|subject|subjects|sample|"
    r"samples|upload|uploads|original|originals|raw|new|folder|neuer|ordner|nouveau|dossier|nueva|carpeta|"
    r"new_folder|dcim|camera|roll|cam|iphone|android|download|downloads|desktop|documents|tmp|temp|test|val|"
    r"valid|validation|held|out|holdout|zip|files|file|my|the|of|for|with|items|and|in|misc|all|album|albums|"
    r"export|exports|input|inputs|crop|cropped|crops|resized|drive|google|takeout|from|icloud|jpg|jpeg|png|"
    r"heic|apple|part|one|two|best|selected|good|final|lora|model|sd"
)
