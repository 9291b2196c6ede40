<?php
// Uses what applications use: strings of several bytes, XML, JSON.
$document = new DOMDocument();
$document->loadXML('<items><item>' . mb_strtoupper('äpfel') . '</item></items>');
echo json_encode(['served' => $document->getElementsByTagName('item')->length]), "\n";
